import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.stream.file_log import FileLog
from monolith_jax.stream.file_producer import FileProducer
from monolith_jax.stream.log import LogPartition, Message
from monolith_jax.stream.log_segments import frame_header, list_segments

ROOT = Path(__file__).parent.parent.parent
EVENTS = LogPartition("events", 0)
HEADER = len(frame_header(0, b"", 0, 0))


@contextmanager
def appending(folder: Path, **options: str) -> Iterator[FileProducer]:
    with closing(FileProducer(folder, options)) as producer:
        producer.create("events", 1)
        yield producer


def write(folder: Path, payloads: Sequence[bytes], **options: str) -> None:
    """Appends, a flush a message."""
    with appending(folder, **options) as producer:
        for payload in payloads:
            producer.append(EVENTS, payload, timestamp_ms=1000 * producer.next_offset(EVENTS))
            producer.flush()


def read(folder: Path, start: int = 0) -> list[Message]:
    """Returns what there is."""
    with closing(FileLog(folder)) as log:
        log.seek(EVENTS, start)
        messages: list[Message] = []
        while got := log.poll(7, 1 << 20, 0.0):
            messages += got[EVENTS]
        return messages


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "events" / "0").glob("*.log"))


def text(offset: int) -> bytes:
    return b"%d," % offset * (offset % 50)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    cut=st.integers(0, 4000),
    segment_bytes=st.sampled_from(["1", "400", "100000"]),
)
def test_a_torn_tail_is_waited_for_and_then_cut(sizes: list[int], cut: int, segment_bytes: str) -> None:
    payloads = [bytes([i]) * size for i, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, payloads, segment_bytes=segment_bytes)
        last = segments(folder)[-1]
        whole = last.read_bytes()
        os.truncate(last, min(cut, len(whole)))
        kept = [message.payload for message in read(folder)]
        assert kept == payloads[: len(kept)]
        with closing(FileLog(folder)) as log:
            assert log.bounds(EVENTS) == (0, len(kept))
            log.seek(EVENTS, len(kept))
            assert log.poll(10, 1000, 0.0) == {}
            write(folder, [b"after"], segment_bytes=segment_bytes)
            assert [message.payload for message in log.poll(10, 1000, 5.0)[EVENTS]] == [b"after"]
        assert [(message.offset, message.payload) for message in read(folder)] == list(enumerate([*kept, b"after"]))


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=10),
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=6),
    segment_bytes=st.sampled_from(["1", "200", "100000"]),
    start=st.integers(0, 9),
)
def test_damage_costs_the_messages_it_hits(
    sizes: list[int], flips: list[tuple[int, int]], segment_bytes: str, start: int
) -> None:
    payloads = [bytes([i]) * size for i, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, payloads, segment_bytes=segment_bytes)
        data = [bytearray(path.read_bytes()) for path in segments(folder)]
        owners = [(i, j, k) for i, j, k in _places(sizes, segments(folder), data)]
        for place, mask in flips:
            i, j, _ = owners[place % len(owners)]
            data[i][j] ^= mask
        before = [path.read_bytes() for path in segments(folder)]
        hurt = {k for i, j, k in owners if data[i][j] != before[i][j]}
        for path, one in zip(segments(folder), data, strict=True):
            path.write_bytes(one)
        _check_damage(folder, payloads, hurt, start)
        write(folder, [b"after"], segment_bytes=segment_bytes)
        messages = read(folder)
        assert [message.offset for message in messages] == list(range(len(messages))) and messages[-1].payload == b"after"


def _places(sizes: list[int], paths: list[Path], data: list[bytearray]) -> Iterator[tuple[int, int, int]]:
    """Yields segment, position and offset of each byte."""
    firsts = [int(path.stem) for path in paths] + [len(sizes)]
    for i, one in enumerate(data):
        owners = [k for k in range(firsts[i], firsts[i + 1]) for _ in range(HEADER + sizes[k])]
        assert len(owners) == len(one)
        yield from ((i, j, k) for j, k in enumerate(owners))


def _check_damage(folder: Path, payloads: list[bytes], hurt: set[int], start: int) -> None:
    messages = read(folder)
    assert [message.offset for message in messages] == list(range(len(messages)))
    assert set(range(len(messages), len(payloads))) <= hurt, "only damage at the very end may be missing"
    for message in messages:
        assert bool(message.fault) == (message.offset in hurt)
        assert message.fault or message.payload == payloads[message.offset]
    if start <= len(messages):
        assert read(folder, start) == messages[start:], "what comes out must not depend on where the reader started"


def test_a_fault_has_what_was_read(tmp_path: Path) -> None:
    write(tmp_path, [b"abc", b"def", b"ghi", b"jkl"])
    (path,) = segments(tmp_path)
    data = bytearray(path.read_bytes())
    data[HEADER] ^= 1
    data[HEADER + 3] ^= 1  # the magic of the second
    data[2 * (HEADER + 3) + 5] ^= 1  # the length of the third
    path.write_bytes(data)
    one, two, three, four = read(tmp_path)
    assert one.fault == "damaged: checksum of the payload" and one.payload == b"`bc" and one.timestamp_ms == 0
    assert two.fault == "damaged: checksum of the header" and two.payload == data[HEADER + 3 : 3 * (HEADER + 3)]
    assert (three.offset, three.payload, three.fault) == (2, b"", "damaged: lost")
    assert (four.offset, four.payload, four.fault) == (3, b"jkl", "")


@pytest.mark.parametrize("lacks", [1, HEADER, HEADER + 5])
def test_a_header_on_the_edge_of_a_read_is_found(tmp_path: Path, lacks: int) -> None:
    # The search after a damaged header reads 2 MiB at a time; the next header starts so many bytes before the end of the first.
    write(tmp_path, [bytes((2 << 20) - HEADER - lacks), b"found"])
    (path,) = segments(tmp_path)
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)
    assert [(message.offset, message.fault != "") for message in read(tmp_path)] == [(0, True), (1, False)]


def test_a_reader_at_a_damaged_tail_goes_on(tmp_path: Path) -> None:
    write(tmp_path, [b"one", b"two"])
    (path,) = segments(tmp_path)
    data = bytearray(path.read_bytes())
    data[HEADER + 3] ^= 1
    path.write_bytes(data)
    with closing(FileLog(tmp_path)) as log:
        log.seek(EVENTS, 0)
        assert len(log.poll(10, 1000, 0.0)[EVENTS]) == 1 and log.poll(10, 1000, 0.01) == {}
        # The tail is as long as before, or longer, and has other bytes.
        for payload in (b"new", b"newer"):
            write(tmp_path, [payload])
            assert [message.payload for message in log.poll(10, 1000, 1.0)[EVENTS]] == [payload]


def test_damage_larger_than_a_read_is_passed(tmp_path: Path) -> None:
    write(tmp_path, [b"a", *[bytes(1 << 20)] * 5, b"z"])
    (path,) = segments(tmp_path)
    data = bytearray(path.read_bytes())
    data[HEADER + 1] ^= 1
    for i in range(1, 5):
        data[HEADER + 1 + i * (HEADER + (1 << 20))] ^= 1
    path.write_bytes(data)
    assert [bool(message.fault) for message in read(tmp_path)] == [False, *[True] * 5, False]


def test_a_lost_end_of_a_full_segment_comes_out_as_faults(tmp_path: Path) -> None:
    write(tmp_path, [bytes(100)] * 9, segment_bytes="400")
    first = segments(tmp_path)[0]
    os.truncate(first, HEADER + 100 + 50)
    messages = read(tmp_path)
    assert [message.offset for message in messages] == list(range(9))
    assert [message.fault != "" for message in messages] == [False, True, True] + [False] * 6


def test_every_flushed_message_outlives_a_killed_process(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "stream" / "append_log.py"), str(tmp_path), "20"]
    flushed = 0
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}) as process:
            assert process.stdout is not None
            flushed = int(process.stdout.readline())
            # The reader follows while the other process appends, over the ends of segments.
            with closing(FileLog(tmp_path)) as log:
                log.seek(EVENTS, 0)
                messages = log.read_to(EVENTS, 4000)
            process.kill()
            for line in process.stdout:
                flushed = int(line)
        assert [(message.offset, message.payload, message.fault) for message in messages] == [
            (i, text(i), "") for i in range(4000)
        ]
        assert len(segments(tmp_path)) > 2
    messages = read(tmp_path)
    assert len(messages) >= flushed
    assert all((message.offset, message.payload) == (i, text(i)) for i, message in enumerate(messages))


def test_a_partition_has_one_producer(tmp_path: Path) -> None:
    with appending(tmp_path) as first:
        first.append(EVENTS, b"one")
        with appending(tmp_path) as second:
            with pytest.raises(ValueError, match="has a producer already"):
                second.append(EVENTS, b"two")
            first.close()
            second.append(EVENTS, b"two")
    assert [message.payload for message in read(tmp_path)] == [b"one", b"two"]


def test_retention_by_bytes_keeps_the_newest(tmp_path: Path) -> None:
    with appending(tmp_path, segment_bytes="1000", retention_bytes="3000") as producer:
        for i in range(100):
            producer.append(EVENTS, bytes(100))
            producer.flush()
            if i == 50:
                with closing(FileLog(tmp_path)) as log:
                    log.seek(EVENTS, log.bounds(EVENTS)[0])
                    assert log.poll(2, 1000, 1.0)
    sizes = [path.stat().st_size for path in segments(tmp_path)]
    assert len(sizes) >= 2 and sum(sizes[:-1]) <= 3000 and int(segments(tmp_path)[0].stem) > 50
    first, end = int(segments(tmp_path)[0].stem), 100
    with closing(FileLog(tmp_path)) as log:
        assert log.bounds(EVENTS) == (first, end)
        log.seek(EVENTS, first - 1)
        with pytest.raises(ValueError, match=rf"offset {first - 1}, but retention .* before offset {first}"):
            log.poll(1, 1, 5.0)
        assert log.offset_at(EVENTS, 0) == first
    assert len(read(tmp_path, first)) == end - first


def test_a_slow_reader_is_told_what_retention_took(tmp_path: Path) -> None:
    with appending(tmp_path, segment_bytes="500", retention_bytes="1000") as producer, closing(FileLog(tmp_path)) as log:
        for i in range(3):
            producer.append(EVENTS, text(i))
        producer.flush()
        log.seek(EVENTS, 0)
        assert len(log.poll(1, 1000, 1.0)[EVENTS]) == 1
        for i in range(3, 100):
            producer.append(EVENTS, text(i))
            producer.flush()
        got: list[Message] = []
        with pytest.raises(ValueError, match="retention"):
            for _ in range(100):
                got += log.poll(1, 1000, 1.0).get(EVENTS, [])
        # What it had open, it still reads to the end; nothing comes out as damaged.
        assert [(message.offset, message.fault) for message in got] == [(i, "") for i in range(1, len(got) + 1)] and got


def test_retention_by_time(tmp_path: Path) -> None:
    write(tmp_path, [bytes(100)] * 10, segment_bytes="300")
    there = segments(tmp_path)
    for path in there[:2]:
        os.utime(path, (time.time() - 100, time.time() - 100))
    with appending(tmp_path, segment_bytes="300", retention_s="50") as producer:
        assert producer.next_offset(EVENTS) == 10
    assert segments(tmp_path) == there[2:]
    for path in there[2:]:
        os.utime(path, (time.time() - 100, time.time() - 100))
    with appending(tmp_path, retention_s="50") as producer:
        producer.next_offset(EVENTS)
    assert segments(tmp_path) == there[-1:]


@pytest.mark.parametrize(("fsync_s", "syncs"), [("0", 5), ("1000", 1), ("inf", 0)])
def test_syncs_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync_s: str, syncs: int) -> None:
    done: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (done.append(file), real(file)))
    write(tmp_path, [b"a"] * 5, fsync_s=fsync_s)
    assert len(done) == syncs


def test_a_full_disk_loses_nothing_that_is_flushed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev
    room = 100

    def full(file: int, parts: list[bytes]) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "no space left")
        written = real(file, [b"".join(parts)[:room]])
        room -= written
        return written

    monkeypatch.setattr(os, "writev", full)
    with appending(tmp_path, segment_bytes="90") as producer:
        for i in range(10):
            producer.append(EVENTS, text(i + 1))
        for more in (0, 7, 33, 41, 80, 1, 100):
            with pytest.raises(OSError, match="no space"):
                producer.flush()
            assert [message.payload for message in read(tmp_path)] == [text(i + 1) for i in range(len(read(tmp_path)))]
            room = more
        room = 1 << 20
        producer.flush()
        producer.append(EVENTS, b"end")
    assert [message.payload for message in read(tmp_path)] == [*(text(i + 1) for i in range(10)), b"end"]


def test_many_appends_need_few_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.writev

    def counting(file: int, parts: list[bytes]) -> int:
        sizes.append(real(file, parts))
        return sizes[-1]

    monkeypatch.setattr(os, "writev", counting)
    with appending(tmp_path) as producer:
        for _ in range(30):
            producer.append(EVENTS, bytes(100_000))
    assert len(sizes) == 3 and read(tmp_path)[-1].offset == 29


def test_times_are_found_over_segments(tmp_path: Path) -> None:
    write(tmp_path, [bytes(100)] * 40, segment_bytes="300")
    assert len(list_segments(tmp_path / "events" / "0")) > 5
    with closing(FileLog(tmp_path)) as log:
        for late_ms in range(-500, 42_000, 250):
            assert log.offset_at(EVENTS, late_ms) == min(40, max(0, -(-late_ms // 1000)))


def test_a_record_at_a_time(tmp_path: Path) -> None:
    """Holds what a log of cuts needs: each record is there when `flush` returns, and one that was torn is written again."""
    cuts = LogPartition("cuts", 0)
    for start in (0, 5):
        with closing(FileProducer(tmp_path)) as producer:
            producer.create("cuts", 1)
            assert producer.next_offset(cuts) == start
            with closing(FileLog(tmp_path)) as log:
                for i in range(start, start + 5):
                    log.seek(cuts, i)
                    producer.append(cuts, b"cut %d" % i)
                    producer.flush()
                    assert [message.payload for message in log.poll(5, 100, 0.0)[cuts]] == [b"cut %d" % i]
        (path,) = (tmp_path / "cuts" / "0").glob("*.log")
        with path.open("ab") as file:
            file.write(frame_header(producer_end := start + 5, b"torn", 0, 0) + b"to")
    with closing(FileProducer(tmp_path)) as producer:
        assert producer.next_offset(cuts) == producer_end == 10


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"segment_byte": "5"}, "segment_bytes"),
        ({"fsync_s": "often"}, "often"),
        ({"retention_s": "-1"}, "-1"),
        ({"segment_bytes": "0"}, "0"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, str], told: str) -> None:
    for opener in (FileLog, FileProducer):
        with pytest.raises(ValueError, match=told):
            opener(tmp_path, options)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A producer makes it"):
        FileLog(tmp_path / "nothing")
