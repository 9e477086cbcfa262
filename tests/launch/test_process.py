"""How processes find each other, who is named when one stays away, and how all end when one is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch.bench.kafka_broker import free_port
from launch.cli import ProcessFlags
from launch.members import Members, find_members
from launch.roll_call import Watch, call_roll
from tests.launch.processes import finish, joined, start, start_member, wait_for_joined

SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_NODELIST": "node[001-004]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
NONE = ProcessFlags()


def flags(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_s: int = 300) -> ProcessFlags:
    return ProcessFlags(coordinator, num_processes, process_id, timeout_s)


def test_flags_come_before_variables() -> None:
    assert find_members(flags("h:1", 2, 1), SLURM | OPEN_MPI) == Members("h:1", 2, 1, None, "flags")
    assert find_members(flags(None, 1, None), SLURM) is None
    found = find_members(flags("[fe80::1]:99", 2, 0), {})
    assert found is not None and (found.host, found.port) == ("fe80::1", 99)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # A shell in an allocation of four, made by an interactive step.
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # The batch script itself.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # salloc's shell.
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_process_on_its_own_joins_nobody(environ: dict[str, str]) -> None:
    assert find_members(NONE, environ) is None


@pytest.mark.parametrize(
    ("given", "environ", "told"),
    [
        (flags("h:1", 2, None), {}, "--process_id missing"),
        (flags(None, None, 1), {}, "--coordinator, --num_processes missing"),
        (flags("h:1", None, 0), SLURM, "--num_processes missing"),
        (flags("h:1", 2, 2), {}, "--process_id is 2; expected 0 to 1"),
        (flags("h:1", 2, -1), {}, "--process_id is -1; expected 0 to 1"),
        (flags("h:1", 0, 0), {}, "--num_processes is 0; expected"),
        (flags("h", 2, 0), {}, "'h' is no HOST:PORT"),
        (flags("h:http", 2, 0), {}, "'h:http' is no HOST:PORT"),
        (flags("h:70000", 2, 0), {}, "'h:70000' is no HOST:PORT"),
        (NONE, {"JOB_COMPLETION_INDEX": "0"}, "--num_processes=1 if each pod is a run of its own"),
        (NONE, {name: value for name, value in OPEN_MPI.items() if "uri" not in name}, "mpirun -x JAX_COORDINATOR_ADDRESS"),
        (NONE, SLURM | {"JAX_COORDINATOR_ADDRESS": "h"}, "JAX_COORDINATOR_ADDRESS: 'h' is no HOST:PORT"),
    ],
)
def test_wrong_flags_and_variables_are_told(given: ProcessFlags, environ: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        find_members(given, environ)


@pytest.mark.parametrize(
    "environ",
    [
        *(SLURM | {"SLURM_STEP_NODELIST": n} for n in ("node7", "node7,x9", "n[001-0015],x", "n[001,007-015],x", "a-b[3]")),
        SLURM | {"JAX_COORDINATOR_PORT": "777"},
        OPEN_MPI,
        OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.1.2.3:43370"},
    ],
)
def test_same_coordinator_as_jax_finds(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """jax's own detection is the oracle; it has no public name, so a jax that moved it skips this."""
    clusters = pytest.importorskip("jax._src.clusters")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    jaxs = clusters.OmpiCluster if "OMPI_COMM_WORLD_SIZE" in environ else clusters.SlurmCluster
    assert jaxs.is_env_present()
    found = find_members(NONE, os.environ)
    address = jaxs.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT")).replace("3]:", "3:")
    assert found is not None
    assert (found.coordinator, found.num_processes, found.process_id) == (
        address,
        jaxs.get_process_count(),
        jaxs.get_process_id(),
    )


def test_what_jax_does_not_find() -> None:
    after = find_members(NONE, SLURM | {"SLURM_STEP_NODELIST": "node[1-4]-ib"})
    six = find_members(NONE, OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620::2]:43370"})
    given = {name: value for name, value in OPEN_MPI.items() if "uri" not in name} | {"JAX_COORDINATOR_ADDRESS": "h:5"}
    five = find_members(NONE, given)
    assert after is not None and after.host == "node1-ib"
    assert six is not None and six.host == "fe80::b9b"
    assert five is not None and five.coordinator == "h:5"


@pytest.mark.parametrize(
    ("environ", "device"),
    [
        (SLURM, None),  # A host to itself: all its GPUs.
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, 1),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, 1),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"}, None),  # --gpus-per-task=1
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1", "JAX_LOCAL_DEVICE_IDS": "2,3"}, None),
        (OPEN_MPI, 1),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, None),
    ],
)
def test_gpus_are_shared_out(environ: dict[str, str], device: int | None) -> None:
    found = find_members(NONE, environ)
    assert found is not None and found.local_device == device


def called(*members: Members, timeout_s: float = 1.0) -> list[Watch | str]:
    """Returns what the roll call gave each of these processes, threads here: a watch, or what it was told."""
    found: list[Watch | str] = [""] * len(members)

    def one(at: int) -> None:
        try:
            found[at] = call_roll(members[at], timeout_s)
        except ValueError as error:
            found[at] = str(error)

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def members_of(size: int, *ids: int, port: int = 0) -> list[Members]:
    address = f"127.0.0.1:{port or free_port()}"
    return [Members(address, size, i, None, "flags") for i in ids]


def test_all_there_and_all_end_together() -> None:
    watches = [one for one in called(*members_of(3, 2, 0, 1), timeout_s=20) if isinstance(one, Watch)]
    assert len(watches) == 3
    ended: list[int] = []

    def close(at: int) -> None:
        watches[at].start()
        watches[at].close()
        ended.append(at)

    threads = [threading.Thread(target=close, args=(at,)) for at in range(3)]
    threads[0].start()
    threads[1].start()
    time.sleep(0.3)
    assert not ended  # The third has not come to its end.
    threads[2].start()
    for thread in threads:
        thread.join(10)
    assert sorted(ended) == [0, 1, 2]


def test_who_stays_away_is_named_to_all() -> None:
    found = called(*members_of(5, 0, 2, 4))
    assert all(isinstance(one, str) and "2 of 5 processes did not join within 1 s: process 1, 3." in one for one in found)


def test_coordinator_that_is_not_there_is_named() -> None:
    (one,) = members_of(2, 1)
    (told,) = called(one)
    assert isinstance(told, str)
    assert f"process 1 of 2 found no coordinator at {one.coordinator} within 1 s" in told
    assert "refused" in told and "the address comes from flags" in told
    (told,) = called(Members("no-such-host.invalid:1", 2, 1, None, "SLURM"))
    assert isinstance(told, str) and "no coordinator at no-such-host.invalid:1" in told and "comes from SLURM" in told


def test_another_program_at_the_port_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (told,) = called(*members_of(2, 0, port=port))
        assert isinstance(told, str) and f"port {port} of this host" in told and "in use" in told

        def greet() -> None:
            try:
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"\x00\x00\x12 not ours\n")
                    connection.close()
            except OSError:
                return

        thread = threading.Thread(target=greet)
        thread.start()
        (told,) = called(*members_of(2, 1, port=port))
        assert isinstance(told, str) and "what answers there does not wait for this process" in told
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_one_id_given_twice_is_told() -> None:
    found = called(*members_of(3, 0, 1, 1))
    assert sum(isinstance(one, str) and "process id 1 is given twice" in one for one in found[1:]) == 1
    assert "process 2." in str(found[0])


def test_two_numbers_of_processes_are_told() -> None:
    port = free_port()
    told = called(*members_of(2, 0, port=port), *members_of(3, 1, port=port))
    assert "was told of 2 processes, process 1 on" in str(told[1]) and "of 3: give all processes the same" in str(told[1])


def test_stranger_and_a_restarted_process_do_not_disturb() -> None:
    zero, one = members_of(2, 0, 1)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(called(zero, timeout_s=20)))
    thread.start()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"run": "monolith_jax", "process_id": "x"}\n'):
        with connected(zero.port) as stranger:
            stranger.sendall(text)
            stranger.settimeout(10)
            with pytest.raises((ConnectionError, AssertionError)):
                assert stranger.recv(100)
    with connected(zero.port) as first:
        first.sendall(b'{"run": "monolith_jax", "process_id": 1, "num_processes": 2, "host": "old"}')
    found.extend(called(one, timeout_s=20))
    thread.join()
    assert [type(each) for each in found] == [Watch, Watch]
    for watch in found:
        watch.start()
    closing = [threading.Thread(target=watch.close) for watch in found]
    for each in closing:
        each.start()
    for each in closing:
        each.join(10)


def connected(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nobody listens")


WATCHED = """
import sys, time
from launch.members import Members
from launch.roll_call import call_roll
watch = call_roll(Members("127.0.0.1:" + sys.argv[1], 3, int(sys.argv[2]), None, "flags"), 20)
watch.start()
print("there", flush=True)
if sys.argv[2] == sys.argv[3]:
    time.sleep(0.2)
    watch.fail("ValueError: a wrong number")
if sys.argv[4] == "close" and sys.argv[2] == "1":
    watch.close()
time.sleep(60)
"""


def watched(fails: int, does: str) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    found = [start([sys.executable, "-c", WATCHED, port, str(i), str(fails), does]) for i in range(3)]
    for process in found:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
    return found


@pytest.mark.parametrize("fails", [0, 1])
def test_process_that_fails_tells_the_others_why(fails: int) -> None:
    found = finish(*watched(fails, ""), within_s=15)
    assert [status for status, _, _ in found] == [1, 1, 1]
    for i, (_, _, err) in enumerate(found):
        assert (f"process {fails} of 3 (host" in err and "ended with an error: ValueError: a wrong number" in err) == (
            i != fails
        )


@pytest.mark.parametrize("lost", [0, 2])
def test_process_that_is_lost_is_named_even_to_one_at_its_end(lost: int) -> None:
    processes = watched(-1, "close")
    time.sleep(0.3)
    processes[lost].kill()
    for i, (status, _, err) in enumerate(finish(*processes, within_s=15)):
        if i != lost:
            assert status == 1
            assert f"process {lost} of 3 (host" in err and "was lost" in err
            assert err.endswith(
                f"Process {i} ends with it. When all have ended, the same command goes on from the last snapshot.\n"
            )


def test_joins_by_open_mpis_variables(tmp_path: Path) -> None:
    port = str(free_port())
    common = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "JAX_COORDINATOR_PORT": port}
    common["OMPI_MCA_orte_hnp_uri"] = "1531576320.0;tcp://127.0.0.1:34911"
    processes = [
        start_member(
            "none", tmp_path, variables=common | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)}
        )
        for i in range(2)
    ]
    for i, (status, out, err) in enumerate(finish(*processes)):
        assert status == 0, err
        assert joined(out) | {"pid": 0} == {
            "process": i, "processes": 2, "devices": 6, "local_devices": 3, "sum": 15.0, "pid": 0
        }  # fmt: skip


@pytest.mark.parametrize("lost", [0, 1])
def test_process_killed_during_a_psum_ends_the_other(lost: int, tmp_path: Path) -> None:
    given = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    processes = [start_member(f"stay:{lost}", tmp_path, *given, f"--process_id={i}") for i in range(2)]
    for process in processes:
        wait_for_joined(process)
    time.sleep(0.5)
    assert processes[1 - lost].poll() is None  # It waits in the psum.
    began = time.monotonic()
    os.kill(processes[lost].pid, signal.SIGKILL)
    ((status, _, err),) = finish(processes[1 - lost], within_s=30)
    finish(processes[lost])
    assert time.monotonic() - began < 5
    assert status not in (0, None)
    assert f"process {lost} of 2 (host" in err and "was lost" in err
    assert "the same command goes on from the last snapshot" in err


@pytest.mark.slow
def test_four_processes_join_and_one_lost_ends_three(tmp_path: Path) -> None:
    given = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=4"]
    processes = [start_member("stay:2", tmp_path, *given, f"--process_id={i}") for i in range(4)]
    seen = [wait_for_joined(process) for process in processes]
    assert [(one["process"], one["devices"], one["sum"]) for one in seen] == [(i, 12, 66.0) for i in range(4)]
    os.kill(processes[2].pid, signal.SIGKILL)
    for i, (status, _, err) in enumerate(finish(*processes, within_s=30)):
        assert status
        assert i == 2 or ("process 2 of 4 (host" in err and "was lost" in err)
