"""From the log to the lake: events, what users did last, and how often videos were watched.

In: the log of impressions and actions, each partition from where the table `events` says that it was read to. Out: epochs. One
epoch appends to `events` whatever was read, to the logs of features every change of them, and brings `user_features` and
`video_features` up to date. `events` is written first, with what was read of which partition: whatever is missing elsewhere
after a crash is made again from the same messages.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.lake.commits import TableWriter, told_of
from monolith_jax.lake.tables import DAY
from monolith_jax.lake.video_counts import VideoCounts
from monolith_jax.lake.warehouse import WarehouseConfig, add_columns
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.formats import Schemas
from monolith_jax.stream.log import LogPartition, Message, open_log
from monolith_jax.stream.log_source import LogConfig
from monolith_jax.stream.run_schema import concatenated

WRITER = "ingest"
TABLES = ("events", "user_features_log", "video_features_log", "user_features", "video_features")
"""In the order in which an epoch is committed."""
POLL_MESSAGES, POLL_BYTES = 65_536, 32 << 20
WAIT_S = 0.02


class Read(NamedTuple):
    """What an epoch has read: offsets by partition, `topic/number`."""

    begin: Mapping[str, int]
    end: Mapping[str, int]


def day_of(times_ms: pa.Array) -> pa.Array:
    """Returns days in UTC, strings such as `2026-11-28`, of Unix times in ms."""
    days = times_ms.cast(pa.timestamp("ms")).cast(pa.date32(), safe=False).dictionary_encode()
    return days.dictionary.cast(pa.string()).take(days.indices)


def events_of(partition: LogPartition, events: pa.RecordBatch, offsets: np.ndarray) -> pa.Table:
    """Returns rows of the table `events`."""
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

    def __init__(self, log: LogConfig, warehouse: WarehouseConfig, dead_letters: DeadLetters) -> None:
        """Opens log and tables, and makes up for what a crash left undone.

        Raises:
            ValueError: There is no such log, topic or table, or the log does not reach back to where the lake ends.
        """
        self._config, self._warehouse, self._dead_letters = log, warehouse, dead_letters
        with ExitStack() as opened:
            self._log = opened.enter_context(closing(open_log(log.url, log.options)))
            schemas = opened.enter_context(closing(open_log(log.url, log.options)))
            self._decoders = {
                topic: Decoder(kind, topic, log.format, Schemas(schemas, topic), future_s=log.future_s)
                for kind, topic in (("impression", log.impressions), ("action", log.actions))
            }
            self._writers = {name: opened.enter_context(closing(TableWriter(warehouse, name, WRITER))) for name in TABLES}
            self._partitions = [
                LogPartition(topic, number) for topic in self._decoders for number in range(self._log.num_partitions(topic))
            ]
            self.counts = VideoCounts(warehouse)
            self._go_on()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Lets go of log and tables; what no epoch holds is read again next time."""
        self._opened.close()

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
            for topic, state in last.told["schemas"].items():
                self._decoders[topic].set_state(state)
            self._dead_letters.set_state(last.told["dead_letters"])
            self.counts.restore(last.epoch, self._since)
            self._make(Read(last.told["begin"], last.told["end"]), last.epoch)
        for partition in self._partitions:
            self._log.seek(partition, self._next[_key(partition)])

    def _since(self, epoch: int) -> list[tuple[pa.RecordBatch, pa.RecordBatch]]:
        """Returns the impressions and actions of each epoch behind one, but for the last."""
        manager, found = self._writers["events"].table.snapshot_manager(), {}
        number = self._writers["events"].last.snapshot
        while number > 0 and len(found) < self.epoch - epoch:
            snapshot = manager.get_snapshot_by_id(number)
            if snapshot is None:
                raise ValueError(
                    f"the counts of videos were saved at epoch {epoch}, and the snapshot {number} of `events`, which tells what "
                    "was read since, is gone: run python -m launch.lake tidy with a longer retention"
                )
            if snapshot.commit_user == WRITER:
                found[snapshot.commit_identifier] = told_of(snapshot)
            number -= 1
        epochs = [found[one] for one in sorted(found) if one < self.epoch]
        return [self._by_kind(self._decoded(self._again(Read(one["begin"], one["end"])))) for one in epochs]

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
            for partition, found in self._log.poll(POLL_MESSAGES, POLL_BYTES, min(WAIT_S, until - now)).items():
                messages.setdefault(partition, []).extend(found)
                self._next[_key(partition)] = found[-1].offset + 1
                size += sum(len(one.payload) for one in found)
        if not messages:
            return 0
        return self._make(Read(begin, dict(self._next)), self.epoch + 1, messages)

    def _make(self, read: Read, epoch: int, messages: dict[LogPartition, list[Message]] | None = None) -> int:
        """Writes an epoch to the tables that lack it."""
        told = {
            "begin": read.begin,
            "end": read.end,
            # Both as they are before the epoch: whoever makes it again begins with them.
            "schemas": {topic: decoder.get_state() for topic, decoder in self._decoders.items()},
            "dead_letters": self._dead_letters.get_state(),
        }
        decoded = self._decoded(self._again(read) if messages is None else messages)
        impressions, actions = self._by_kind(decoded)
        counts = self.counts.add(impressions, actions)
        rows = self._rows(decoded, impressions, counts)
        for name, writer in self._writers.items():
            if writer.last.epoch >= epoch:
                continue
            for of_table in rows[name]:
                writer.write(of_table)
            writer.commit(epoch, told if name == "events" else {})
        self.counts.saved(epoch)
        self.epoch = epoch
        return sum(len(events) for _, events, _ in decoded)

    def _rows(
        self, decoded: Sequence[tuple[LogPartition, pa.RecordBatch, np.ndarray]], impressions: pa.RecordBatch, counts: pa.Table
    ) -> dict[str, list[pa.Table]]:
        events = [events_of(*one) for one in decoded]
        self._add_columns(events)
        activity = activity_of(impressions)
        newest = newest_of(activity, "user_id", "activity_ms")
        return {
            "events": events,
            "user_features_log": [activity],
            "video_features_log": [counts],
            "user_features": [newest],
            "video_features": [counts],
        }

    def _add_columns(self, events: Sequence[pa.Table]) -> None:
        """Gives `events` the columns of features that impressions were logged with."""
        writer = self._writers["events"]
        known = {*writer.schema.names}
        missing = {field.name: field for table in events for field in table.schema if field.name not in known}
        if missing:
            add_columns(self._warehouse, "events", list(missing.values()))
            writer.reopen()

    def _decoded(
        self, messages: Mapping[LogPartition, Sequence[Message]]
    ) -> list[tuple[LogPartition, pa.RecordBatch, np.ndarray]]:
        decoded = []
        for partition in self._partitions:
            if partition in messages:
                decoder = self._decoders[partition.topic]
                events, rejected, offsets = decoder.decode_with_offsets(partition, messages[partition])
                self._dead_letters.add(rejected)
                decoded.append((partition, events, offsets))
        return decoded

    def _by_kind(
        self, decoded: Sequence[tuple[LogPartition, pa.RecordBatch, np.ndarray]]
    ) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Returns the impressions and the actions."""
        of_topics = []
        for topic, decoder in self._decoders.items():
            batches = [events for partition, events, _ in decoded if partition.topic == topic]
            of_topics.append(concatenated(batches) if batches else decoder.schema.empty_table().to_batches()[0])
        return of_topics[0], of_topics[1]


def _key(partition: LogPartition) -> str:
    return f"{partition.topic}/{partition.number}"
