import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from monolith_jax.ids import threads
from monolith_jax.ids.threads import MapperConfig, ShardThreads, make_threads, numa_nodes, parse_cpus

ALLOWED = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
TWO_CPUS = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two CPUs to pin threads to")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("", set()),
        ("\n", set()),
        ("0\n", {0}),
        ("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}),
        ("0-1,128-129", {0, 1, 128, 129}),
        ("7-7", {7}),
    ],
)
def test_lists_of_cpus(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize(
    "text",
    [
        *("a", "-3", "0-b", "0 1", "0:2", "1-2-3"),
        *("0-", "3-1"),
    ],
)
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(ValueError):
        parse_cpus(text)


def tree(root: Path, nodes: dict[str, str | None]) -> Path:
    """A folder like that of Linux; None: a node without a list."""
    for other in ("online", "possible"):
        (root / other).write_text("0-1\n")
    (root / "power").mkdir()
    for name, cpus in nodes.items():
        (root / name).mkdir()
        if cpus is not None:
            (root / name / "cpulist").write_text(cpus)
    return root


EIGHT = frozenset(range(8))


@pytest.mark.parametrize(
    ("nodes", "allowed", "expected"),
    [
        ({"node0": "0-7\n"}, EIGHT, [EIGHT]),
        ({"node0": "0-1,4-5\n", "node1": "2-3,6-7\n"}, EIGHT, [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        # Nodes with memory only have an empty list.
        ({"node0": "0-3\n", "node1": "4-7\n", "node2": "\n"}, EIGHT, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        ({"node0": "\n"}, EIGHT, [EIGHT]),
        # By number, and not by name.
        ({"node10": "6-7\n", "node2": "2-5\n", "node0": "0-1\n"}, EIGHT, [{0, 1}, {2, 3, 4, 5}, {6, 7}]),
        # A container may use some CPUs only, or none of a node.
        ({"node0": "0-3\n", "node1": "4-7\n"}, {3, 4, 5}, [{3}, {4, 5}]),
        ({"node0": "0-3\n", "node1": "4-7\n"}, {5, 6}, [{5, 6}]),
        ({"node0": "0-3\n", "node1": "4-7\n"}, {9}, [{9}]),
        # A host whose nodes cannot be read has one.
        ({"node0": "0-3\n", "node1": "what\n"}, EIGHT, [EIGHT]),
        ({"node0": "0-3\n", "node1": None}, EIGHT, [EIGHT]),
        ({}, EIGHT, [EIGHT]),
    ],
)
def test_nodes_of_a_host(nodes: dict[str, str | None], allowed: set[int], expected: list[set[int]], tmp_path: Path) -> None:
    assert list(numa_nodes(frozenset(allowed), tree(tmp_path, nodes))) == expected


def test_nodes_of_this_host_hold_all_its_cpus_once(tmp_path: Path) -> None:
    assert numa_nodes(EIGHT, tmp_path / "missing") == (EIGHT,)
    nodes = numa_nodes(ALLOWED)
    assert all(nodes) and sum(map(len, nodes)) == len(frozenset().union(*nodes)) and frozenset().union(*nodes) <= ALLOWED


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7, 16, 17, 100])
@pytest.mark.parametrize("num_shards", [2, 16, 64])
def test_every_shard_is_worked_on_once_by_the_same_thread(num_threads: int, num_shards: int) -> None:
    pool = ShardThreads(num_threads, ())
    ranges = pool.ranges(num_shards)
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])] and ranges[-1][1] == num_shards
    sizes = [last - first for first, last in ranges]
    assert len(sizes) == num_threads and max(sizes) - min(sizes) <= 1
    done: list[tuple[int, str]] = []
    for _ in range(2):
        pool.run(lambda first, last: done.extend((k, threading.current_thread().name) for k in range(first, last)), num_shards)
    # Each shard twice, by one thread.
    assert Counter(done) == {(shard, name): 2 for shard, name in done} and len(set(done)) == num_shards
    assert {shard for shard, _ in done} == set(range(num_shards))
    assert len({name for _, name in done}) == min(num_threads, num_shards)


def test_threads_work_at_the_same_time() -> None:
    meeting, came = threading.Barrier(3, timeout=30), []
    ShardThreads(3, ()).run(lambda first, last: came.append(meeting.wait()), 16)
    assert sorted(came) == [0, 1, 2]


def test_one_thread_without_nodes_is_the_callers() -> None:
    names = []
    ShardThreads(1, ()).run(lambda first, last: names.append((first, last, threading.get_ident())), 16)
    assert names == [(0, 16, threading.get_ident())]


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_the_first_error_of_a_task_is_raised_when_all_have_ended(num_threads: int) -> None:
    pool, done, held = ShardThreads(num_threads, ()), [], threading.Event()

    def fail(first: int, last: int) -> None:
        if last == 16:
            held.wait(0.1)  # ends after the others have failed
            done.append(first)
        raise KeyError(first)

    with pytest.raises(KeyError, match=r"^0$"):
        pool.run(fail, 16)
    assert done == [pool.ranges(16)[-1][0]]
    pool.run(lambda first, last: done.append(first), 16)
    assert sorted(done[1:]) == [first for first, _ in pool.ranges(16)]


def affinities(pool: ShardThreads, num_shards: int = 16) -> dict[int, frozenset[int]]:
    """CPUs of each range's thread, by first shard."""
    seen: dict[int, frozenset[int]] = {}
    pool.run(lambda first, last: seen.__setitem__(first, frozenset(os.sched_getaffinity(0))), num_shards)
    return seen


@TWO_CPUS
@pytest.mark.parametrize("num_threads", [2, 3, 4, 5])
def test_threads_stay_on_their_node(num_threads: int) -> None:
    one, other = (frozenset({cpu}) for cpu in sorted(ALLOWED)[:2])
    pool = ShardThreads(num_threads, (one, other))
    for _ in range(2):
        found = [cpus for _, cpus in sorted(affinities(pool).items())]
        # Neighbours share a node, and each node has its part of the threads.
        split = found.index(other)
        assert found == [one] * split + [other] * (num_threads - split)
        assert abs(2 * split - num_threads) <= 1
    assert os.sched_getaffinity(0) == ALLOWED, "the caller is not pinned"


@TWO_CPUS
def test_one_node_pins_nothing() -> None:
    for nodes in ((), (frozenset(sorted(ALLOWED)[:1]),)):
        assert set(affinities(ShardThreads(2, nodes)).values()) == {ALLOWED}
    assert affinities(ShardThreads(1, (frozenset(sorted(ALLOWED)[:1]),))) == {0: ALLOWED}


def test_a_cpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(Exception, match="initializer"):
        affinities(ShardThreads(2, (frozenset({10**6}), frozenset({10**6 + 1}))))


FORK = """
import os, sys, threading
from monolith_jax.ids.threads import ShardThreads

def first_shards(pool):
    names = []
    pool.run(lambda first, last: names.append((first, threading.get_ident() != threading.main_thread().ident)), 16)
    return sorted(names)

pool = ShardThreads(4, ())
expected = [(0, False), (4, True), (8, True), (12, True)]
assert first_shards(pool) == expected
child = os.fork()
if not child:
    for _ in range(2):
        assert first_shards(pool) == expected
    grandchild = os.fork()
    assert first_shards(pool) == expected
    if grandchild:
        assert os.waitpid(grandchild, 0)[1] == 0
    sys.exit(0)  # which waits for threads, as the end of a program does
assert first_shards(pool) == expected
assert os.waitpid(child, 0)[1] == 0
print("all done")
"""

SPAWN = """
import multiprocessing, os
from monolith_jax.ids.threads import MapperConfig, ShardThreads, make_threads

def shards_in_child(pool):
    shards = []
    for threads in (pool, make_threads(MapperConfig(threads=2))):
        threads.run(lambda first, last: shards.extend(range(first, last)), 16)
    return os.getpid(), sorted(shards)

if __name__ == "__main__":
    ran = make_threads(MapperConfig(threads=3))
    ran.run(lambda first, last: None, 16)
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        process, shards = processes.apply(shards_in_child, (ShardThreads(3, ()),))
        processes.close()
        processes.join()
    assert process != os.getpid() and shards == sorted([*range(16)] * 2)
    print("all done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("script", [FORK, SPAWN], ids=["fork", "spawn"])
def test_other_processes_have_threads_of_their_own(script: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(threads.__file__).parents[2])}
    # Later versions of Python warn of every fork of a process with threads.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "all done\n", "")


@pytest.mark.parametrize(
    ("nodes", "config", "number", "nodes_left"),
    [
        # A quarter of the CPUs, at least one a node.
        ((32,), MapperConfig(), 8, 0),
        ((2,), MapperConfig(), 1, 0),
        ((16, 16), MapperConfig(), 8, 2),
        ((2, 2, 2), MapperConfig(), 3, 3),
        ((32,), MapperConfig(threads=5), 5, 0),
        ((16, 16), MapperConfig(threads=2), 2, 2),
        # Fewer threads than nodes could not be near the shards of all.
        ((16, 16), MapperConfig(threads=1), 1, 0),
        ((2, 2, 2), MapperConfig(threads=2), 2, 0),
        ((16, 16), MapperConfig(numa="off"), 8, 0),
        ((2, 2, 2), MapperConfig(numa="off"), 1, 0),
    ],
)
def test_threads_of_a_config(
    nodes: tuple[int, ...], config: MapperConfig, number: int, nodes_left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = [sum(nodes[:k]) for k in range(len(nodes))]
    cpus = tuple(frozenset(range(start, start + size)) for start, size in zip(starts, nodes, strict=True))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set().union(*cpus))
    monkeypatch.setattr(threads, "numa_nodes", lambda allowed: cpus)
    made = make_threads(config)
    assert made.num_threads == number and made._nodes == cpus[:nodes_left]


def test_threads_of_this_host() -> None:
    made = make_threads(MapperConfig())
    assert 1 <= made.num_threads <= max(len(ALLOWED), 1)
    assert sorted(made.ranges(64))[-1][1] == 64


def test_a_config_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"MapperConfig.threads must be 0 .* or more, got -1"):
        make_threads(MapperConfig(threads=-1))
