"""From the log to the lake: events, what users did last, and how often videos were watched.

In: the log of impressions and actions, each partition from where the table `events` says that it was read to. Out: epochs. One
epoch appends to `events` whatever was read, to the logs of features every change of them, and brings `user_features` and
`video_features` up to date. `events` is written first, with what was read of which partition: whatever is missing elsewhere
after a crash is made again from the same messages.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.lake.commits import TableWriter, resume_letters, told_of
from monolith_jax.lake.counters import WindowCountsConfig
from monolith_jax.lake.tables import DAY, events_schema
from monolith_jax.lake.times import day_of
from monolith_jax.lake.video_counts import Counted, VideoCounts
from monolith_jax.lake.warehouse import WarehouseConfig, add_columns, alone, storable
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.events import ACTION, IMPRESSION
from monolith_jax.stream.formats import Schemas
from monolith_jax.stream.log import LogPartition, Message, open_log
from monolith_jax.stream.log_source import LogConfig
from monolith_jax.stream.run_schema import concatenated
from monolith_jax.types import Rejected

WRITER = "ingest"
TABLES = ("events", "user_features_log", "video_features_log", "user_features", "video_features")
"""In the order in which an epoch is committed."""
POLL_MESSAGES, POLL_BYTES = 65_536, 32 << 20
WAIT_S = 0.02


class Read(NamedTuple):
    """What an epoch has read: offsets by partition, `topic/number`."""

    begin: Mapping[str, int]
    end: Mapping[str, int]


class Decoded(NamedTuple):
    """The events of one partition in an epoch."""

    partition: LogPartition
    events: pa.RecordBatch
    offsets: np.ndarray
    """int64 [B], of the message of each."""
    appended_ms: int
    """When the log took the last message: no event moves time further than that."""


def events_of(decoded: Decoded) -> pa.Table:
    """Returns rows of the table `events`."""
    partition, events, offsets, _ = decoded
    columns = dict(zip(events.schema.names, events.columns, strict=True))
    number = events.num_rows
    columns["topic"] = pa.DictionaryArray.from_arrays(np.zeros(number, np.int32), [partition.topic]).cast(pa.string())
    columns["log_partition"] = pa.array(np.full(number, partition.number, np.int32))
    columns["log_offset"] = pa.array(offsets)
    columns[DAY] = day_of(columns["event_time_ms"])
    return pa.Table.from_pydict(columns)


def activity_of(impressions: pa.RecordBatch) -> pa.Table:
    """Returns a row of `user_features_log` for each impression: what its user was shown last from then on."""
    times = impressions.column("event_time_ms")
    return pa.Table.from_pydict(
        {
            "event_time_ms": times,
            DAY: day_of(times),
            "user_id": impressions.column("user_id"),
            "activity_ms": times,
            "last_video_id": impressions.column("video_id"),
            "last_author_id": impressions.column("author_id"),
            "last_duration_ms": impressions.column("duration_ms"),
            "last_tag_id": impressions.column("tag_id"),
        }
    )


def newest_of(changes: pa.Table, key: str, time_column: str) -> pa.Table:
    """Returns the last row of each id: of the latest time, of equal ones the one that came last."""
    ids, times = changes.column(key).to_numpy(), changes.column(time_column).to_numpy()
    order = np.lexsort((np.arange(ids.size), times, ids))
    is_last = np.append(ids[order][1:] != ids[order][:-1], True) if ids.size else np.zeros(0, np.bool_)
    return changes.take(pa.array(np.sort(order[is_last])))


class Ingest:
    """Brings a log into a lake, epoch by epoch. For one thread."""

    def __init__(
        self,
        log: LogConfig,
        warehouse: WarehouseConfig,
        dead_letters: DeadLetters,
        counts: WindowCountsConfig,
        out_of_order_s: float,
    ) -> None:
        """Opens log and tables, and makes up for what a crash left undone.

        Args:
            log: The log.
            warehouse: The lake, whose tables are there.
            dead_letters: Where messages go that are none.
            counts: How much is counted of videos.
            out_of_order_s: A window is told of so long after its end, in event time; what comes later is late.

        Raises:
            ValueError: There is no such log, topic or table, or the log does not reach back to where the lake ends.
        """
        self._config, self._warehouse, self._dead_letters = log, warehouse, dead_letters
        self.not_kept: set[str] = set()
        """Columns of impressions that the table cannot take."""
        self._whole = False
        """Whether all tables have all that was counted."""
        with ExitStack() as opened:
            opened.enter_context(alone(warehouse, WRITER))
            self._log = opened.enter_context(closing(open_log(log.url, log.options)))
            schemas = opened.enter_context(closing(open_log(log.url, log.options)))
            formats = (log.format, Schemas(schemas, log.impressions)), (log.format, Schemas(schemas, log.actions))
            self._decoders = {
                log.impressions: Decoder("impression", log.impressions, *formats[0], future_s=log.future_s),
                log.actions: Decoder("action", log.actions, *formats[1], future_s=log.future_s),
            }
            self._writers = {name: opened.enter_context(closing(TableWriter(warehouse, name, WRITER))) for name in TABLES}
            self._partitions = [
                LogPartition(topic, number) for topic in self._decoders for number in range(self._log.num_partitions(topic))
            ]
            self.counts = VideoCounts(self._writers["events"].table, counts)
            self._out_of_order_ms = int(1000 * out_of_order_s)
            self._newest_ms: dict[str, int] = {}
            self._watermark_ms = 0
            self._came_s = dict.fromkeys(map(_key, self._partitions), time.monotonic())
            self._go_on()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Lets go of log and tables; what no epoch holds is read again next time."""
        try:
            self._save(at_once=True)
        finally:
            self._opened.close()

    def _save(self, at_once: bool) -> None:
        """Saves the counts, so that the next start need not count again, and whatever it needs of the log beside them."""
        if self._whole and self.epoch >= 0:
            self.counts.save(self.epoch, {**self._state(), "newest_ms": self._newest_ms}, at_once)

    def _state(self) -> dict[str, Any]:
        schemas = {topic: decoder.get_state() for topic, decoder in self._decoders.items()}
        return {"schemas": schemas, "dead_letters": self._dead_letters.get_state()}

    def _set_state(self, state: Mapping[str, Any]) -> None:
        for topic, schema in state["schemas"].items():
            self._decoders[topic].set_state(schema)
        resume_letters(self._dead_letters, state["dead_letters"])
        self._newest_ms = dict(state["newest_ms"])

    def unread(self) -> int:
        """Returns how many messages are ahead, asking the log."""
        return sum(self._log.bounds(one)[1] - self._next[_key(one)] for one in self._partitions)

    def _go_on(self) -> None:
        """Takes up where the lake ends: makes the last epoch again where a table lacks it."""
        last = self._writers["events"].last
        self.epoch, self._next = last.epoch, dict(last.told.get("end", {}))
        for partition in self._partitions:
            first, end = self._log.bounds(partition)
            begin = self._next.setdefault(_key(partition), first if self._config.begin == "earliest" else end)
            if not first <= begin <= end:
                raise ValueError(
                    f"the lake has read {_key(partition)} up to message {begin}, and the log holds {first} to {end}: was the "
                    "topic made anew, or has retention taken what was not read? Take another warehouse, or a longer retention"
                )
        if last.epoch >= 0:
            is_whole = all(writer.last.epoch >= last.epoch for writer in self._writers.values())
            if is_whole and (saved := self.counts.load(last.epoch)) is not None:
                self._set_state(saved)
                self._watermark_ms, self._whole = last.told["watermark_ms"], True
            else:
                self._set_state(last.told)
                self.counts.restore(last.epoch, self._since)
                self._make(Read(last.told["begin"], last.told["end"]), last.epoch, last.told["watermark_ms"])
        for partition in self._partitions:
            self._log.seek(partition, self._next[_key(partition)])

    def _since(self, epoch: int) -> Iterator[Counted]:
        """Yields what was counted in each epoch behind one, but for the last."""
        events = self._writers["events"]
        manager, found = events.table.snapshot_manager(), {}
        number = events.last.snapshot
        while number > 0 and len(found) < self.epoch - epoch:
            snapshot = manager.get_snapshot_by_id(number)
            if snapshot is None:
                if epoch < 0:
                    break  # Nothing was saved, or it was removed: they begin with what is still told.
                raise ValueError(
                    f"the counts of videos were saved at epoch {epoch}, and the snapshot {number} of `events`, which tells "
                    "what was read since, is gone: remove state/counts-* of the table to begin to count anew"
                )
            if snapshot.commit_user == WRITER:
                found[snapshot.commit_identifier] = told_of(snapshot)
            number -= 1
        for one in sorted(found):
            if one < self.epoch:
                decoded, _ = self._decoded(self._again(Read(found[one]["begin"], found[one]["end"])))
                yield Counted(*self._by_kind(decoded), found[one]["watermark_ms"])

    def _again(self, read: Read) -> dict[LogPartition, list[Message]]:
        """Returns the messages that an epoch had read."""
        messages = {}
        for partition in self._partitions:
            begin, end = read.begin.get(_key(partition), 0), read.end.get(_key(partition), 0)
            if end > begin:
                self._log.seek(partition, begin)
                messages[partition] = self._log.read_to(partition, end)
        return messages

    def step(self, commit_s: float, most_bytes: int) -> int:
        """Makes an epoch of what comes within so many seconds, at most about so many bytes; returns how many events it has.

        Raises:
            ValueError: The log refuses.
        """
        begin, messages, size = dict(self._next), {}, 0
        until = time.monotonic() + commit_s
        while size < most_bytes and (now := time.monotonic()) < until:
            room = min(POLL_BYTES, most_bytes - size)
            for partition, found in self._log.poll(POLL_MESSAGES, room, min(WAIT_S, until - now)).items():
                messages.setdefault(partition, []).extend(found)
                self._next[_key(partition)] = found[-1].offset + 1
                self._came_s[_key(partition)] = now
                size += sum(len(one.payload) for one in found)
        if not messages:
            self._save(at_once=True)
            return 0
        return self._make(Read(begin, dict(self._next)), self.epoch + 1, None, messages)

    def _note_times(self, decoded: Sequence[Decoded]) -> None:
        for one in decoded:
            if one.events.num_rows:
                newest_ms: int = min(pc.max(one.events.column("event_time_ms")).as_py(), one.appended_ms)
                name = _key(one.partition)
                self._newest_ms[name] = max(self._newest_ms.get(name, newest_ms), newest_ms)

    def _watermark(self) -> int:
        """Returns how far time has gone, which the clock decides too: partitions that bring nothing are not waited for."""
        unread, now_s, times = self._log.unread(), time.monotonic(), []
        for partition in self._partitions:
            name = _key(partition)
            if unread.get(partition, 0) or now_s - self._came_s[name] < self._config.idle_s:
                times.append(self._newest_ms.get(name, 0))
        slowest_ms = min(times, default=max(self._newest_ms.values(), default=0))
        return max(slowest_ms - self._out_of_order_ms, self._watermark_ms)

    def _make(
        self,
        read: Read,
        epoch: int,
        watermark_ms: int | None,
        messages: dict[LogPartition, list[Message]] | None = None,
    ) -> int:
        """Writes an epoch to the tables that lack it; `watermark_ms`: what it was decided to be, None: is decided now."""
        self._whole = False
        # As it is before the epoch: whoever makes it again begins with that.
        told = {"begin": read.begin, "end": read.end, **self._state(), "newest_ms": dict(self._newest_ms)}
        decoded, rejected = self._decoded(self._again(read) if messages is None else messages)
        self._dead_letters.add(rejected)
        impressions, actions = self._by_kind(decoded)
        self._note_times(decoded)
        self._watermark_ms = self._watermark() if watermark_ms is None else watermark_ms
        told["watermark_ms"] = self._watermark_ms
        counts = self.counts.add(Counted(impressions, actions, self._watermark_ms))
        activity = activity_of(impressions)
        rows = {
            "events": [self._kept(one) for one in decoded],
            "user_features_log": [activity],
            "video_features_log": [counts],
            "user_features": [newest_of(activity, "user_id", "activity_ms")],
            "video_features": [counts],
        }
        self._add_columns(rows["events"])
        for name, writer in self._writers.items():
            if writer.last.epoch < epoch:
                for of_table in rows[name]:
                    writer.write(of_table)
                writer.commit(epoch, told if name == "events" else {})
        self.epoch, self._whole = epoch, True
        self._save(at_once=False)
        return sum(one.events.num_rows for one in decoded)

    def _kept(self, decoded: Decoded) -> pa.Table:
        """Returns rows of `events`, without the columns that it cannot take: of actions only what all have."""
        events = decoded.events
        if decoded.partition.topic == self._config.actions:
            events = events.select(ACTION.names)
        own = [one for one in events_schema().names if one not in (*IMPRESSION.names, *ACTION.names)]
        strange = [name for name in events.schema.names if name in own]
        rows = events_of(decoded._replace(events=events.drop_columns(strange) if strange else events))
        rows, refused = storable(rows, self._writers["events"].schema)
        self.not_kept |= {*strange, *refused}
        return rows

    def _add_columns(self, events: Sequence[pa.Table]) -> None:
        """Gives `events` the columns of features that impressions were logged with."""
        writer = self._writers["events"]
        known = {*writer.schema.names}
        missing = {field.name: field for table in events for field in table.schema if field.name not in known}
        if missing:
            add_columns(self._warehouse, "events", list(missing.values()))
            writer.reopen()

    def _decoded(self, messages: Mapping[LogPartition, Sequence[Message]]) -> tuple[list[Decoded], list[Rejected]]:
        decoded, bad = [], []
        for partition in self._partitions:
            if partition in messages:
                decoder = self._decoders[partition.topic]
                events, rejected, offsets = decoder.decode_with_offsets(partition, messages[partition])
                bad += rejected
                appended_ms = max(one.timestamp_ms for one in messages[partition])
                decoded.append(Decoded(partition, events, offsets, appended_ms))
        return decoded, bad

    def _by_kind(self, decoded: Sequence[Decoded]) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Returns the impressions and the actions."""
        of_topics = []
        for topic, decoder in self._decoders.items():
            batches = [one.events for one in decoded if one.partition.topic == topic and one.events.num_rows]
            of_topics.append(concatenated(batches) if batches else pa.RecordBatch.from_pylist([], decoder.schema))
        return of_topics[0], of_topics[1]


def _key(partition: LogPartition) -> str:
    return f"{partition.topic}/{partition.number}"
