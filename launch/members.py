"""Who belongs to a run: flags and the cluster's variables to a coordinator's address, a number of processes and this one's id.

In: `ProcessFlags` and the environment. Out: `Members`, or None for a process on its own. Who says so, in this order:

- Flags: `--coordinator`, `--num_processes` and `--process_id`, all three; or `--num_processes=1` for a run on its own.
- Open MPI's `mpirun`: `OMPI_COMM_WORLD_SIZE`, `_RANK`, `_LOCAL_SIZE`, `_LOCAL_RANK`; the coordinator's host is the launcher's,
  in `OMPI_MCA_orte_hnp_uri` (4.x only).
- SLURM's `srun`: `SLURM_JOB_ID`, `SLURM_PROCID`, `SLURM_LOCALID`, `SLURM_STEP_NODELIST`, `SLURM_STEP_NUM_TASKS`,
  `SLURM_STEP_NUM_NODES`; the coordinator is on the step's first host.
- Kubernetes: `JOB_COMPLETION_INDEX` says that this is a pod of an indexed Job, not of how many; flags are asked for, as
  `launch/cluster/jobset.yaml` gives them.

`JAX_COORDINATOR_ADDRESS=HOST:PORT` replaces the address of Open MPI and SLURM, `JAX_COORDINATOR_PORT` its port; the ports are
those of jax's own detection. That detection is not used: it does not tell the address, which the roll call needs first; it
takes one GPU for a process that has its host to itself; it knows no Open MPI 5; for Kubernetes it needs a package and the right
to list pods.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launch.cli import ProcessFlags

_FIRST_PORT, _PORTS = 61440, 4096
_HOW = "--coordinator=HOST:PORT --num_processes=N --process_id=I"


@dataclass(frozen=True)
class Members:
    """The processes of a run, seen from one of them."""

    coordinator: str
    """HOST:PORT of process 0."""
    num_processes: int
    """All processes of the run, at least 2."""
    process_id: int
    """This one's, from 0."""
    local_device: int | None
    """The one GPU of this host that this process takes; None: all that it sees."""
    told_by: str
    """Who said so, for messages."""

    @property
    def host(self) -> str:
        """The coordinator's host; IPv6 addresses without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The coordinator's port."""
        return int(self.coordinator.rpartition(":")[2])


def find_members(flags: ProcessFlags, environ: Mapping[str, str]) -> Members | None:
    """Returns the processes of the run, None where this process is all of it.

    Raises:
        ValueError: Flags are missing or do not fit together, or the variables do not say enough.
    """
    if any(flag is not None for flag in (flags.coordinator, flags.num_processes, flags.process_id)):
        return _by_flags(flags)
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return _by_open_mpi(environ)
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    # A batch script or a shell in an allocation has SLURM_NTASKS too; only srun tells a task of its step.
    if all(name in environ for name in needed) and int(environ["SLURM_STEP_NUM_TASKS"]) > 1:
        return _by_slurm(environ)
    if "JOB_COMPLETION_INDEX" in environ:
        raise ValueError(
            f"this is a pod of an indexed Job, and nothing says how many belong to the run: pass {_HOW} as "
            f"launch/cluster/jobset.yaml does, or --num_processes=1 if each pod is a run of its own"
        )
    return None


def _by_flags(flags: ProcessFlags) -> Members | None:
    if flags.num_processes == 1 and not flags.process_id:
        return None
    given = {"--coordinator": flags.coordinator, "--num_processes": flags.num_processes, "--process_id": flags.process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: several processes need {_HOW}, each process its own I")
    assert flags.coordinator is not None and flags.num_processes is not None and flags.process_id is not None
    if flags.num_processes < 1:
        raise ValueError(f"--num_processes is {flags.num_processes}; expected the number of processes of the run, at least 1")
    _check_id(flags.process_id, flags.num_processes, "--process_id")
    return Members(_checked(flags.coordinator, "--coordinator"), flags.num_processes, flags.process_id, None, "flags")


def _by_open_mpi(environ: Mapping[str, str]) -> Members:
    size, rank = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_RANK"])
    _check_id(rank, size, "OMPI_COMM_WORLD_RANK")
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\.\d+;tcp6?://(?:\[(?P<six>[^,\]]+)|(?P<four>[^,:]+))", uri)
    if found:
        host = f"[{found['six']}]" if found["six"] else found["four"]
        address = _overridden(environ, host, int(found[1]) // _PORTS)
    elif "JAX_COORDINATOR_ADDRESS" in environ:
        address = _overridden(environ, "", 0)
    else:
        raise ValueError(
            f"mpirun started {size} processes, but OMPI_MCA_orte_hnp_uri does not say where the first one runs (Open MPI 5 "
            f"does not set it): mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT, with the host of rank 0 and a free port there"
        )
    alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return Members(address, size, rank, _local(environ, alone, "OMPI_COMM_WORLD_LOCAL_RANK"), "Open MPI")


def _by_slurm(environ: Mapping[str, str]) -> Members:
    size, rank = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_PROCID"])
    _check_id(rank, size, "SLURM_PROCID")
    # node7 | node7,other | node[001-015],other | node[001,007-015]
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?", environ["SLURM_STEP_NODELIST"])
    if not found:
        raise ValueError(f"SLURM_STEP_NODELIST is {environ['SLURM_STEP_NODELIST']!r}; expected a list like node[001-015],other")
    host = found[1] + (found[2] or "") + (found[3] or "")
    address = _overridden(environ, host, int(environ["SLURM_JOB_ID"]))
    alone = environ.get("SLURM_STEP_NUM_NODES") == environ["SLURM_STEP_NUM_TASKS"]
    return Members(address, size, rank, _local(environ, alone, "SLURM_LOCALID"), "SLURM")


def _local(environ: Mapping[str, str], alone: bool, name: str) -> int | None:
    """Returns the GPU of a process that shares its host: the one with its number, unless it sees a single one anyway."""
    narrowed = "JAX_LOCAL_DEVICE_IDS" in environ or len(environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    return None if alone or narrowed or name not in environ else int(environ[name])


def _overridden(environ: Mapping[str, str], host: str, job: int) -> str:
    if "JAX_COORDINATOR_ADDRESS" in environ:
        return _checked(environ["JAX_COORDINATOR_ADDRESS"], "JAX_COORDINATOR_ADDRESS")
    return _checked(f"{host}:{environ.get('JAX_COORDINATOR_PORT', _FIRST_PORT + job % _PORTS)}", "JAX_COORDINATOR_PORT")


def _checked(address: str, name: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{name}: {address!r} is no HOST:PORT; expected process 0's host and a free port, 10.0.0.1:12345")
    return address


def _check_id(process_id: int, num_processes: int, name: str) -> None:
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"{name} is {process_id}; expected 0 to {num_processes - 1}, since the run has {num_processes} processes"
        )
