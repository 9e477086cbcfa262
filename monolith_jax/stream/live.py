"""The reading of a live stream: from the log and its cuts to chunks of examples.

    log --messages--> decoder --events--> joiner --examples whose window has closed--> chunks
     |                                      ^
     +-- offsets, waits: a cut --> cut log --+-- watermark

What the stream becomes is a function of the log and of the cuts (`cuts`). A position names the next cut, and the first one from
which the joiner still holds something: what the joiner held is rebuilt by reading from there again, and is never saved. So a
run that goes on sees the same examples as one that was never interrupted: first by the cuts that are written, then live.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream.assigned import assign
from monolith_jax.stream.cuts import Cut, CutLog, Read
from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.formats import Schemas
from monolith_jax.stream.joiner import Joiner
from monolith_jax.stream.log import LogPartition, Message, open_log
from monolith_jax.stream.run_schema import concatenated
from monolith_jax.stream.watermarks import Watermarks
from monolith_jax.types import Chunk, Position, Rejected

if TYPE_CHECKING:
    from monolith_jax.stream.log_source import LogConfig  # Which imports this module.

MIN_CUT_S = 0.02
"""A stream that has caught up is cut this often at most: the price of a cut hardly depends on its size."""
IN_STEPS = 1 << 16
"""Where more impressions are open than this, a jump of the watermark closes their windows in steps, `STEPS` to a window."""
STEPS = 64
ASK_S = 1.0
"""How long an answer of the log is waited for while it is read."""


class Events(NamedTuple):
    """Messages of one partition, decoded."""

    read: Read
    batch: pa.RecordBatch
    rejected: tuple[Rejected, ...]


def _key(partition: LogPartition) -> str:
    return f"{partition.topic}/{partition.number}"


def _by_partition(values: dict[str, int]) -> dict[LogPartition, int]:
    parted = {key: key.rpartition("/") for key in values}
    return {LogPartition(topic, int(number)): values[key] for key, (topic, _, number) in parted.items()}


class LiveReading:
    """One reading of a live stream: everything that moves."""

    def __init__(
        self, config: LogConfig, folder: Path, batch_rows: int, index: int, number: int, max_lag_s: float, position: Position
    ) -> None:
        """Opens the log and the cut log; nothing is read yet. Arguments as those of `LogSource`."""
        self.config, self.folder, self.batch_rows, self.max_lag_s = config, folder, batch_rows, max_lag_s
        self.index, self.number = index, number
        with ExitStack() as opened:
            self.cuts = opened.enter_context(closing(CutLog(folder)))
            self.log = opened.enter_context(closing(open_log(config.url, config.options)))
            self.schema_log = opened.enter_context(closing(open_log(config.url, config.options)))
            self._opened = opened.pop_all()
        self.decoders = {
            config.impressions: self._decoder("impression", config.impressions),
            config.actions: self._decoder("action", config.actions),
        }
        self.joiner = self._empty_joiner()
        self.cut: int = position.get("cut", 0)
        self.rewind: int = position.get("rewind", 0)
        self.done: bool = position.get("done", False)
        self.pending: int = position.get("pending", 0)
        self.skipped: int = position.get("skipped", 0)
        self.watermark_ms: int = position.get("watermark_ms", Cut().watermark_ms)
        self.next, self.ends, self.newest_ms = (_by_partition(position.get(name, {})) for name in ("next", "ends", "newest_ms"))
        self.counts: dict[str, int] = dict(position.get("counts", {}))
        for topic, state in position.get("schemas", {}).items():
            self.decoders[topic].set_state(state)
        self.schemas = [(self.rewind, self._schemas())]
        self.at: dict[LogPartition, int] = {}
        self.appended_ms: dict[LogPartition, int] = {}
        self.caught_up = False
        self.away_until_s = 0.0
        self.waiting_s = self.last_cut_s = time.monotonic()

    def close(self) -> None:
        """Lets go of the logs and of what the joiner holds."""
        self.joiner.close()
        self._opened.close()

    def _schemas(self) -> dict[str, Any]:
        return {topic: decoder.get_state() for topic, decoder in self.decoders.items()}

    @property
    def position(self) -> Position:
        """Where reading goes on."""
        rewind = min(self.joiner.oldest_cut, self.cut)
        while len(self.schemas) > 1 and self.schemas[1][0] <= rewind:
            del self.schemas[0]
        by_partition = {"next": self.next, "ends": self.ends, "newest_ms": self.newest_ms}
        return {
            "cut": self.cut,
            "rewind": rewind,
            "done": self.done,
            "pending": self.pending,
            "skipped": self.skipped,
            "watermark_ms": self.watermark_ms,
            **{name: {_key(one): value for one, value in values.items()} for name, values in by_partition.items()},
            # What was spilled is no function of the events: it begins anew with each reading.
            "counts": {name: count for name, count in self.joiner.counts.items() if name != "spilled_bytes"},
            "schemas": self.schemas[0][1],  # Those that the cut had from which on all is read again.
        }

    def chunks(self) -> Iterator[Chunk]:
        """Yields the chunks of the cuts that are written, then live ones."""
        self._rebuild()
        _, written = self.cuts.bounds
        for cut in self.cuts.read(self.cut, written):
            yield self._take(cut, self._events(self._messages(cut)))
        config, ends = self.config, self.config.ends
        if self.done or not ends:
            self.ends = {}  # A log that has grown since is read on.
        topics, latest = (config.impressions, config.actions), config.begin == "latest" and not self.cut
        found = assign(self.log, config.url, topics, self.index, self.number, self.next, latest, ends and not self.ends)
        for read in found.starts:
            self._start(read)
        if self.done and self._at_the_end():
            return
        self.done = False
        for partition in found.partitions:
            self._seek(partition, self.next[partition])
        # A run that goes on knows which partitions bring nothing; a new one waits and sees.
        idle = {one for one in found.quiet if self.cut and one not in self.newest_ms}
        watermarks, starts = Watermarks(found.partitions, self.newest_ms, time.monotonic(), idle), found.starts
        while not self.done:
            cut, events = self._next_cut(watermarks, starts)
            starts = ()
            self.cuts.append(cut)
            chunk = self._take(cut, events)
            yielded_s = time.monotonic()
            yield chunk
            # Who takes the chunks may be slow; a batch is not cut short for that.
            self.waiting_s += time.monotonic() - yielded_s

    def _decoder(self, kind: Literal["impression", "action"], topic: str) -> Decoder:
        config = self.config
        return Decoder(kind, topic, config.format, Schemas(self.schema_log, topic), future_s=config.future_s)

    def _empty_joiner(self) -> Joiner:
        return Joiner(self.config.joiner, self.folder / "spill")

    def _rebuild(self) -> None:
        """Brings the joiner to where it was at the position: reads again all of which it still held something."""
        for number, cut in enumerate(self.cuts.read(self.rewind, self.cut), self.rewind):
            if cut.skipped:
                self.joiner.close()
                self.joiner = self._empty_joiner()
            self._join(number, self._events(self._messages(cut)), cut.watermark_ms)
        self.joiner.set_counts(self.counts)

    def _messages(self, cut: Cut) -> list[tuple[Read, list[Message]]]:
        """Returns what a cut that was written had read."""
        messages = []
        for read in cut.reads:
            self._seek(read.partition, read.begin)
            messages.append((read, self.log.read_to(read.partition, read.end)))
            self.at[read.partition] = read.end
        return messages

    def _seek(self, partition: LogPartition, offset: int) -> None:
        if self.at.get(partition) != offset:
            self.log.seek(partition, offset)
            self.at[partition] = offset

    def _events(self, messages: Sequence[tuple[Read, list[Message]]]) -> list[Events]:
        """Decodes messages, and notes how new they are."""
        events = []
        for read, of_partition in messages:
            batch, rejected = self.decoders[read.partition.topic].decode(read.partition, of_partition)
            events.append(Events(read, batch, rejected))
            if of_partition:
                self.appended_ms[read.partition] = of_partition[-1].timestamp_ms
            if batch.num_rows:
                newest_ms: int = pc.max(batch.column("event_time_ms")).as_py()  # pyright: ignore[reportAttributeAccessIssue]
                # A clock that is ahead moves the watermark no further than to the time at which the log took the event.
                newest_ms = min(newest_ms, max(message.timestamp_ms for message in of_partition))
                self.newest_ms[read.partition] = max(self.newest_ms.get(read.partition, newest_ms), newest_ms)
        return events

    def _join(self, number: int, events: Sequence[Events], watermark_ms: int) -> pa.RecordBatch | None:
        """Gives a cut's events to the joiner; returns the examples that are due."""
        topics = (self.config.impressions, self.config.actions)
        batches = [
            [one.batch for one in events if one.read.partition.topic == topic and one.batch.num_rows] for topic in topics
        ]
        impressions, actions = (concatenated(of_topic) if of_topic else None for of_topic in batches)
        if (schemas := self._schemas()) != self.schemas[-1][1]:
            self.schemas.append((number + 1, schemas))
        return self.joiner.join(number, impressions, actions, watermark_ms)

    def _start(self, read: Read) -> None:
        self.next[read.partition] = read.begin
        if read.end >= 0:
            self.ends[read.partition] = read.end

    def _take(self, cut: Cut, events: Sequence[Events]) -> Chunk:
        """Returns what a cut makes of its events, and goes on behind it."""
        for read in cut.starts:
            self._start(read)
        if cut.skipped:
            counts = dict(self.joiner.counts)
            counts["dropped_impressions"] = counts.get("dropped_impressions", 0) + self.joiner.num_open
            self.joiner.close()
            self.joiner = self._empty_joiner()
            self.joiner.set_counts(counts)
            self.skipped += cut.skipped
        for read in cut.reads:
            self.next[read.partition] = read.end
        examples = self._join(self.cut, events, cut.watermark_ms)
        examples = pa.RecordBatch.from_pylist([]) if examples is None else examples
        self.cut += 1
        self.watermark_ms, self.done = cut.watermark_ms, cut.is_last
        self._count_waiting(cut, examples.num_rows)
        rejected = tuple(row for one in events for row in one.rejected)
        return Chunk(examples, rejected, self.position, ends_batch=cut.ends_batch, told=self._told())

    def _count_waiting(self, cut: Cut, num_rows: int) -> None:
        """Counts the examples that wait for their batch to fill, and since when."""
        if cut.ends_batch or self.pending + num_rows >= self.batch_rows or (num_rows and not self.pending):
            self.waiting_s = time.monotonic()
        self.pending = 0 if cut.ends_batch else (self.pending + num_rows) % self.batch_rows

    def _told(self) -> dict[str, float]:
        unread = self.log.unread()
        now_s, known = time.time(), self.watermark_ms > Cut().watermark_ms
        return {
            "lag_s": self._lag_s(),
            "lag_messages": sum(unread.values()),
            "watermark_age_s": now_s - self.watermark_ms / 1000 if known else 0.0,
            "open_impressions": self.joiner.num_open,
            "skipped_messages": self.skipped,
            **{name: count for name, count in self.joiner.counts.items() if name not in ("impressions", "actions", "examples")},
        }

    def _lag_s(self) -> float:
        """Returns how old the next message is, about: as old as the last one of a partition that has some unread."""
        late = [self.appended_ms[one] for one, many in self.log.unread().items() if many and one in self.appended_ms]
        return max(time.time() - min(late) / 1000, 0.0) if late else 0.0

    def _next_cut(self, watermarks: Watermarks, starts: tuple[Read, ...]) -> tuple[Cut, list[Events]]:
        """Waits for the next cut that changes anything; returns it with what it reads."""
        config = self.config
        while True:
            self._leave_time()
            watermarks.look_for_idle(config.idle_s, time.monotonic(), self._has_unread)
            self.log.pause(watermarks.ahead(int(1000 * config.ahead_s)))
            messages = self._poll()
            # Only when something came: a log that cannot be reached is waited for.
            if messages and self._lag_s() > self.max_lag_s and (skip := self._skip()):
                return skip, []
            events = self._events(messages)
            for one in events:
                watermarks.saw(one.read.partition, time.monotonic(), one.batch.num_rows)
            for partition, end in self.ends.items():
                if self.log.at(partition) >= end:
                    watermarks.end(partition)
            watermark_ms, is_last = self._watermark(watermarks)
            # While there is more to read, a batch fills by itself.
            ends_batch = self.caught_up and time.monotonic() - self.waiting_s >= config.max_wait_s
            if events or starts or ends_batch or is_last or watermark_ms > self.watermark_ms:
                reads = tuple(one.read for one in events)
                return Cut(reads, watermark_ms, ends_batch and not is_last, starts, 0, is_last), events

    def _leave_time(self) -> None:
        """Waits until there may be enough for a cut, where the stream has caught up."""
        now_s = time.monotonic()
        if self.caught_up and now_s < self.last_cut_s + MIN_CUT_S:
            time.sleep(self.last_cut_s + MIN_CUT_S - now_s)
        self.last_cut_s = time.monotonic()

    def _has_unread(self, partition: LogPartition) -> bool:
        if time.monotonic() < self.away_until_s:
            return True  # Nobody knows: the log cannot be reached.
        try:
            return self.log.bounds(partition, ASK_S)[1] > self.log.at(partition)
        except OSError:
            self.away_until_s = time.monotonic() + self.config.idle_s
            return True

    def _poll(self) -> list[tuple[Read, list[Message]]]:
        """Returns what is there, waiting no longer than the examples that wait for their batch."""
        config = self.config
        if self._at_the_end():
            return []
        wait_s = min(max(self.waiting_s + config.max_wait_s - time.monotonic(), 0.0), config.max_wait_s)
        found = self.log.poll(config.poll_messages, config.poll_bytes, wait_s)
        num_bytes = sum(len(message.payload) for messages in found.values() for message in messages)
        count = sum(map(len, found.values()))
        self.caught_up = count < config.poll_messages and 2 * num_bytes < config.poll_bytes
        read = []
        for partition, messages in found.items():
            end = self.ends.get(partition)
            if end is not None and messages[-1].offset >= end:
                messages = [message for message in messages if message.offset < end]
            if messages:
                self.at[partition] = messages[-1].offset + 1
                read.append((Read(partition, self.next[partition], self.at[partition]), messages))
        return read

    def _at_the_end(self) -> bool:
        return all(self.next[partition] >= self.ends.get(partition, 1 << 62) for partition in self.next)

    def _watermark(self, watermarks: Watermarks) -> tuple[int, bool]:
        """Returns how far time has gone, and whether this is the end of the stream."""
        joiner = self.config.joiner
        target = watermarks.watermark_ms()
        if watermarks.all_ended:
            window_ms = int(1000 * (joiner.window_s + joiner.late_s)) + 1
            target = max(self.newest_ms.values(), default=self.watermark_ms - window_ms) + window_ms
        now_ms = target = self.watermark_ms if target is None else max(target, self.watermark_ms)
        if self.joiner.num_open > IN_STEPS and self.watermark_ms > Cut().watermark_ms:
            now_ms = min(target, self.watermark_ms + max(int(1000 * joiner.window_s) // STEPS, 1))
        return now_ms, watermarks.all_ended and now_ms == target

    def _skip(self) -> Cut | None:
        """Returns the cut that goes on nearer to the present, and leaves out what lies between; None if nothing does."""
        at_ms = int(1000 * (time.time() - self.max_lag_s / 2))
        goes_on = []
        for partition, offset in self.next.items():
            end = self.ends.get(partition, -1)
            begin = self.log.offset_at(partition, at_ms)
            goes_on.append(Read(partition, max(min(begin, end) if end >= 0 else begin, offset), end))
        skipped = sum(read.begin - self.next[read.partition] for read in goes_on)
        if not skipped:
            return None
        for read in goes_on:
            self.log.seek(read.partition, read.begin)
            self.at[read.partition] = read.begin
        # How late it is, only what is read from there tells.
        self.appended_ms.clear()
        return Cut((), self.watermark_ms, False, tuple(goes_on), skipped)
