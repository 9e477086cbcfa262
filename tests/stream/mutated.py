"""Mutates messages of every format and decodes them: `python -m tests.stream.mutated NUMBER`, a process that a crash would end.

Prints one line of counts. Raises where an event is lost: one that is neither as it was nor set aside with its offset.
"""

import collections
import json
import sys
import zlib

import numpy as np
import pyarrow as pa

from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.events import ACTIONS
from monolith_jax.stream.formats import FORMATS, Schemas, announce, encode
from monolith_jax.stream.log import LogPartition, Message
from tests.stream.memory_log import MemoryLog

POLL = 200
MAX_BYTES = 1 << 16
KINDS = {
    "arrow": (
        "truncated",
        "flipped",
        "flipped, right checksum",
        "zeroed, right checksum",
        "cut, right checksum",
        "other schema",
    ),
    "json": ("truncated", "flipped", "wrong type", "two objects", "half an object", "deep", "other value"),
    "protobuf": ("truncated", "flipped"),
    "debezium": ("truncated", "flipped", "wrong type", "two objects", "deletion", "deep", "other value"),
}
"""Of each format, apart from `ALWAYS`."""
ALWAYS = ("empty", "huge", "random", "fault", "none")
CAUGHT = {"truncated", "flipped", "empty", "huge", "random", "fault", "cut, right checksum", "other schema"}
"""What an Arrow message never survives."""
CAUGHT_TEXT = {
    "empty",
    "huge",
    "random",
    "fault",
    "wrong type",
    "two objects",
    "half an object",
    "deep",
    "other value",
    "deletion",
}
"""What a JSON message never survives; another may be an event still, with other values."""


def impressions(rng: np.random.Generator, number: int) -> pa.RecordBatch:
    ids = {name: rng.integers(-(2**62), 2**62, number) for name in ("request_id", "user_id", "video_id", "author_id")}
    times = 1_700_000_000_000 + rng.integers(0, 10**9, number)
    tags = [rng.integers(0, 9, size).tolist() or None for size in rng.integers(0, 4, number)]
    others = {"score": rng.random(number), "place": [f"é{one}" for one in rng.integers(0, 9, number)]}
    kinds = {"tag_id": pa.array(tags, pa.list_(pa.int64())), "duration_ms": pa.array(rng.integers(0, 10**6, number))}
    return pa.record_batch({"event_time_ms": times, **ids, **kinds, **others})


def actions(rng: np.random.Generator, number: int) -> pa.RecordBatch:
    ids = {name: rng.integers(-(2**62), 2**62, number) for name in ("request_id", "user_id", "video_id", "event_id")}
    names = np.array([*ACTIONS, "play", "dwell"])[rng.integers(0, 10, number)]
    times = 1_700_000_000_000 + rng.integers(0, 10**9, number)
    return pa.record_batch({"event_time_ms": times, **ids, "action": names, "value": rng.integers(0, 10**6, number)})


def _flipped(rng: np.random.Generator, payload: bytes, first: int = 0) -> bytes:
    changed = bytearray(payload)
    for _ in range(int(rng.integers(1, 4))):
        changed[int(rng.integers(first, len(changed)))] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed) if bytes(changed) != payload else _flipped(rng, payload, first)


def _resealed(payload: bytes) -> bytes:
    return zlib.crc32(payload[4:]).to_bytes(4, "little") + payload[4:]


def _of_json(rng: np.random.Generator, payload: bytes, kind: str) -> bytes:
    row = json.loads(payload)
    match kind:
        case "wrong type":
            inner = row["after"] if "op" in row else row
            inner["user_id"] = [["text"], "text", [1], True, {"a": 1}, 1.5][int(rng.integers(0, 6))]
        case "deletion":
            row["op"] = "d"
        case "deep":
            return b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
        case "other value":
            return [b"null", b"3", b"[1]", b'"text"', b"   ", b"\n", b"{}{}", b"}", b"{"][int(rng.integers(0, 9))]
        case "two objects":
            return payload + [b"", b"\n", b","][int(rng.integers(0, 3))] + payload
        case "half an object":
            return payload[: int(rng.integers(1, len(payload) - 1))]
    return json.dumps(row).encode()


def _replaced(rng: np.random.Generator, payload: bytes, kind: str) -> bytes:
    match kind:
        case "huge":
            return payload + bytes(MAX_BYTES)
        case "random":
            return rng.bytes(int(rng.integers(1, 200)))
    return _of_json(rng, payload, kind)


def mutate(rng: np.random.Generator, message: Message, kind: str, other_number: int) -> Message:
    payload, schema, fault = message.payload, message.schema, ""
    match kind:
        case "none":
            pass
        case "truncated":
            payload = payload[: int(rng.integers(0, len(payload)))]
        case "flipped":
            payload = _flipped(rng, payload)
        case "flipped, right checksum":
            payload = _resealed(_flipped(rng, payload, 8))
        case "zeroed, right checksum":
            first = int(rng.integers(8, len(payload)))
            size = int(rng.integers(1, 16))
            payload = _resealed(payload[:first] + bytes([int(rng.integers(0, 2)) * 255] * size) + payload[first + size :])
        case "cut, right checksum":
            payload = _resealed(payload[: int(rng.integers(8, len(payload) - 8))])
        case "other schema":
            schema = [0, 12345, other_number][int(rng.integers(0, 3))]
        case "empty":
            payload = b""
        case "fault":
            fault = "broken segment"
        case _:
            payload = _replaced(rng, payload, kind)
    return Message(message.offset, payload, message.timestamp_ms, schema, fault)


class Fuzz:
    """Polls of one topic and format."""

    def __init__(self, seed: int, kind: str, format: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.kind, self.format = kind, format
        self.rows = 5 if format == "arrow" else 1
        self.log = MemoryLog()
        self.schemas = Schemas(self.log, "topic")
        self.events = (impressions if kind == "impression" else actions)(self.rng, POLL * self.rows)
        number = announce(self.log, self.schemas, "topic", self.events.schema) if format == "arrow" else 0
        self.other = announce(self.log, self.schemas, "topic", actions(self.rng, 1).schema.append(pa.field("user", pa.int32())))
        slices = [self.events.slice(first, self.rows) for first in range(0, len(self.events), self.rows)]
        self.messages = [Message(at, encode(one, format)[0], 0, number) for at, one in enumerate(slices)]
        self.decoder = self.new_decoder()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.mutations = 0
        self.polls = 0

    def new_decoder(self) -> Decoder:
        return Decoder("impression" if self.kind == "impression" else "action", "topic", self.format, self.schemas, MAX_BYTES)

    def poll(self) -> None:
        """Decodes a poll of which nearly a third is mutated, and checks that each event is there or accounted for."""
        kinds = (*KINDS[self.format], *ALWAYS)
        picked = [
            str(self.rng.choice(kinds)) if self.rng.random() < 0.3 else "none"
            for _ in self.messages
        ]  # fmt: skip
        mutated = [mutate(self.rng, message, kind, self.other) for message, kind in zip(self.messages, picked, strict=True)]
        self.mutations += sum(kind != "none" for kind in picked)
        if self.polls % 50 == 0:  # a flipped letter of a name is a new column, of which a long run would gather a thousand
            self.decoder = self.new_decoder()
        state = self.decoder.get_state()
        batch, rejected = self.decoder.decode(LogPartition("topic", 0), mutated)
        batch.validate(full=True)
        self.reasons.update(one.reason for one in rejected)
        self.check(picked, batch, [one.where for one in rejected])
        self.polls += 1
        if self.polls % 4 == 1:
            self.check_again(mutated, state, batch, rejected)

    def check_again(self, mutated: list[Message], state: dict, batch: pa.RecordBatch, rejected: tuple) -> None:
        again = self.new_decoder()
        again.set_state(state)
        same, same_rejected = again.decode(LogPartition("topic", 0), mutated)
        assert same.schema == batch.schema and same_rejected == rejected, "decoding again gives something else"
        assert same.serialize() == batch.serialize(), "decoding again gives something else"  # as bytes: NaN is unlike itself

    def check(self, picked: list[str], batch: pa.RecordBatch, where: list[str]) -> None:
        assert len(where) == len(set(where)), "an event was set aside twice"
        whole = {int(place.split("@")[1]) for place in where if "#" not in place}
        single = collections.Counter(int(place.split("@")[1].split("#")[0]) for place in where if "#" in place)
        caught = CAUGHT if self.format == "arrow" else CAUGHT_TEXT
        if self.format == "protobuf":
            caught = {"empty", "huge", "fault"}
        for at, kind in enumerate(picked):
            assert kind != "none" or (at not in whole and not single[at]), f"a good message was set aside: {at}"
            assert kind not in caught or at in whole, f"message {at}, {kind}, was not set aside"
        intact = [at for at, kind in enumerate(picked) if kind == "none"]
        changed = [at for at, kind in enumerate(picked) if kind != "none" and at not in whole]
        if all(picked[at] not in ("flipped, right checksum", "zeroed, right checksum") for at in changed):
            assert len(batch) + sum(single.values()) == self.rows * (len(intact) + len(changed)), "an event was lost"
        # Each good message's rows are there, together and in order: found by their request id.
        first = {int(one): at for at, one in enumerate(batch.column("request_id").to_pylist())}
        requests = self.events.column("request_id").to_pylist()
        rows = np.array([first[requests[at * self.rows + inner]] for at in intact for inner in range(self.rows)], np.int64)
        assert (np.diff(rows) > 0).all(), "events changed their order"
        wanted = np.array([at * self.rows + inner for at in intact for inner in range(self.rows)])
        for name in self.events.schema.names:
            given = batch.column(name).take(pa.array(rows))
            assert given.to_pylist() == self.events.column(name).take(pa.array(wanted)).to_pylist(), f"column {name} changed"


def run(number: int, seed: int = 0) -> dict[str, int]:
    """Mutates at least so many messages over all formats; returns the counts of reasons."""
    reasons: collections.Counter[str] = collections.Counter()
    for kind in ("impression", "action"):
        for format in FORMATS:
            fuzz = Fuzz(seed, kind, format)
            while fuzz.mutations * 2 * len(FORMATS) < number:
                fuzz.poll()
            reasons.update({f"{format}: {reason}": count for reason, count in fuzz.reasons.items()})
    return dict(reasons.most_common())


if __name__ == "__main__":
    found = run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(json.dumps({"set aside": sum(found.values()), "reasons": found}))
