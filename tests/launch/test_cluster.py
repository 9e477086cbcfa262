"""The files of launch/cluster, run as far as one host can: real processes, the cluster's variables, the documented fields."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.bench.kafka_broker import free_port
from tests.launch.processes import CONFIG, MEMBER, ROOT, finish, joined, start

CLUSTER = ROOT / "launch" / "cluster"
LOCAL = str(CLUSTER / "local.sh")
# What the JobSet API v1alpha2 and the Kubernetes API know at each place of our file, and the type there.
FIELDS: dict[str, dict[str, type]] = {
    "": {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
    "spec": {
        "replicatedJobs": list, "network": dict, "successPolicy": dict, "failurePolicy": dict, "startupPolicy": dict,
        "suspend": bool, "coordinator": dict, "managedBy": str, "ttlSecondsAfterFinished": int,
    },
    "spec.network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "spec.failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": list},
    "job": {"name": str, "groupName": str, "template": dict, "replicas": int, "dependsOn": list},
    "job.template": {"metadata": dict, "spec": dict},
    "job.template.spec": {
        "parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int, "activeDeadlineSeconds": int,
        "template": dict, "suspend": bool, "podFailurePolicy": dict,
    },
    "job.template.spec.template.spec": {
        "restartPolicy": str, "terminationGracePeriodSeconds": int, "containers": list, "volumes": list, "nodeSelector": dict,
    },
    "container": {
        "name": str, "image": str, "command": list, "args": list, "env": list, "ports": list, "resources": dict,
        "volumeMounts": list,
    },
}  # fmt: skip


def expect(out: str, processes: int = 2) -> None:
    """Checks what the members of a run printed, each line maybe after a label."""
    seen = sorted((joined(line) for line in out.splitlines() if '"process"' in line), key=lambda one: one["process"])
    assert [(one["process"], one["devices"], one["sum"]) for one in seen] == [
        (i, 3 * processes, sum(range(3 * processes))) for i in range(processes)
    ]


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Returns an interpreter that runs `member.py` where it is told `-m launch.train`."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "-m launch.train" ] || exit 9\nshift 2\nexec {sys.executable} {MEMBER} none "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_local_script_joins_two(python: str, tmp_path: Path) -> None:
    command = [LOCAL, "2", python, "-m", "launch.train", *CONFIG, f"--workdir={tmp_path}"]
    ((status, out, err),) = finish(start(command))
    assert status == 0, err
    expect(out)
    assert {line[:4] for line in out.splitlines()} == {"[0] ", "[1] "}


@pytest.mark.slow
def test_local_script_joins_four(python: str, tmp_path: Path) -> None:
    ((status, out, err),) = finish(start([LOCAL, "4", python, "-m", "launch.train", *CONFIG, f"--workdir={tmp_path}"]))
    assert status == 0, err
    expect(out, 4)


WAITS = """
import signal, sys, time
def stop(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", sys.argv[1:], flush=True)
if "fails" in sys.argv and "--process_id=1" in sys.argv:
    print("no", file=sys.stderr)
    sys.exit(7)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_script_passes_signals_on(number: signal.Signals) -> None:
    process = start([LOCAL, "3", sys.executable, "-c", WAITS])
    assert process.stdout is not None
    ready = [process.stdout.readline() for _ in range(3)]
    assert sorted(line[:3] for line in ready) == ["[0]", "[1]", "[2]"]
    assert all(re.search(r"--coordinator=127\.0\.0\.1:\d+', '--num_processes=3', '--process_id=\d'", line) for line in ready)
    os.kill(process.pid, number)
    ((status, out, err),) = finish(process, within_s=20)
    assert status == 0, err
    assert sorted(out.splitlines()) == [f"[{i}] got {number.name}" for i in range(3)]


def test_local_script_ends_all_when_one_fails() -> None:
    began = time.monotonic()
    ((status, out, err),) = finish(start([LOCAL, "3", sys.executable, "-c", WAITS, "fails"], {"GRACE_S": "1"}), within_s=30)
    assert status == 7 and "[1] no" in err
    assert sorted(line for line in out.splitlines() if "got" in line) == ["[0] got SIGTERM", "[2] got SIGTERM"]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [(["2"], {}, "usage"), (["x", "true"], {}, "usage"), (["2", "true"], {"GPUS": "3"}, "cannot share 3 GPUs")],
)
def test_local_script_tells_what_is_wrong(arguments: list[str], variables: dict[str, str], told: str) -> None:
    ((status, _, err),) = finish(start([LOCAL, *arguments], variables))
    assert status == 2 and told in err


def test_local_script_shares_gpus_out() -> None:
    ((_, out, _),) = finish(start([LOCAL, "2", "sh", "-c", "echo $JAX_LOCAL_DEVICE_IDS", "x"], {"GPUS": "8"}))
    assert sorted(out.splitlines()) == ["[0] 0,1,2,3", "[1] 4,5,6,7"]


# What srun does here: one process a task, with the variables that the step's tasks see.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=0 "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""


def test_sbatch_file_joins_two_under_srun(python: str, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": python, "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2",
        "SLURM_SUBMIT_DIR": str(ROOT), "JAX_COORDINATOR_PORT": str(free_port()),
    }  # fmt: skip
    command = ["bash", str(CLUSTER / "train.sbatch"), *CONFIG, f"--workdir={tmp_path}"]
    ((status, out, err),) = finish(start(command, variables))
    assert status == 0, err
    expect(out)


def jobset() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the JobSet, its one Job and the Job's one container."""
    whole = yaml.safe_load((CLUSTER / "jobset.yaml").read_text(encoding="utf-8"))
    (job,) = whole["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return whole, job, container


@pytest.mark.parametrize("place", FIELDS)
def test_jobset_has_known_fields_of_the_right_type(place: str) -> None:
    whole, job, container = jobset()
    found = {"": whole, "job": job, "container": container}.get(place)
    if found is None:
        found = job if place.startswith("job") else whole
        for name in place.removeprefix("job.").split("."):
            found = found[name]
    for name, value in found.items():
        assert name in FIELDS[place], f"{place} has no field {name}"
        assert type(value) is FIELDS[place][name], f"{place}.{name}"


def test_jobset_is_consistent() -> None:
    whole, job, container = jobset()
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec, network = job["template"]["spec"], whole["spec"]["network"]
    assert spec["completionMode"] == "Indexed" and network["enableDNSHostnames"]
    assert f"--num_processes={spec['parallelism']}" in container["args"] and spec["parallelism"] == spec["completions"]
    host = f"{whole['metadata']['name']}-{job['name']}-0-0.{network['subdomain']}"
    assert f"--coordinator={host}:{container['ports'][0]['containerPort']}" in container["args"]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert job["replicas"] == 1 and spec["template"]["spec"]["restartPolicy"] == "Never" and spec["backoffLimit"] == 0


def test_pods_of_the_jobset_join(python: str, tmp_path: Path) -> None:
    """Runs the container's command for each index; its name for the coordinator becomes this host's."""
    _, _, container = jobset()
    port, pods = free_port(), []
    for index in range(2):
        variables = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": str(index)}
        expanded = [re.sub(r"\$\((\w+)\)", lambda name, seen=variables: seen[name[1]], one) for one in container["args"]]
        moved = [re.sub(r"^--coordinator=.*", f"--coordinator=127.0.0.1:{port}", one) for one in expanded]
        given = [one for one in moved if not one.startswith(("--gin_file", "--workdir"))]
        command = [python, *container["command"][1:], *CONFIG, f"--workdir={tmp_path}", *given]
        pods.append(start(command, variables | {"JAX_PLATFORMS": "cpu", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}))
    found = finish(*pods)
    assert [status for status, _, _ in found] == [0, 0], found
    expect("".join(out for _, out, _ in found))
