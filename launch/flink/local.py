"""A Flink cluster on this machine, for tests and for trying the jobs of this folder.

In: SQL files and what stands for their variables. Out: jobs that run, on one JobManager and one TaskManager that listen on
127.0.0.1 only. Flink's own distribution comes as a Python package, connectors come by Maven; both are fetched once.
Kafka, PostgreSQL and the warehouse are others' business: see README.md here.

    python -m launch.flink.local FOLDER tables.sql sources.sql events.sql --set KAFKA=127.0.0.1:9092 --set WAREHOUSE=/lake ...
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.bench.kafka_broker import end_process, free_port, locked, start_watched

HERE = Path(__file__).parent
DISTRIBUTION, JARS = HERE / "distribution", HERE / "jars"
REQUIRED = "MONOLITH_JAX_REQUIRE_FLINK"
VERSION = "1.20.5"
_PACKAGE = f"apache-flink-libraries=={VERSION}"
_OPENED = "java.lang java.net java.io java.nio java.text java.time java.util java.util.concurrent java.util.concurrent.atomic"
# What the distribution's own configuration opens for Java 17, in as far as these jobs need it.
_JAVA = [
    "java",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
    *(f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in _OPENED.split()),
    "--add-opens=java.base/java.lang.reflect=ALL-UNNAMED",
    "--add-opens=java.base/java.util.concurrent.locks=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
]
_CLASSES = f"{DISTRIBUTION}/lib/*:{JARS}/*"
_LOGGING = """
rootLogger.level = INFO
rootLogger.appenderRef.file.ref = File
appender.file.name = File
appender.file.type = FILE
appender.file.fileName = ${sys:log.file}
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d %p %c{1} %m%n
"""
_START_S = 90.0


def missing() -> str:
    """Fetches Flink and the connectors unless they are there; returns why there can be no cluster, '' if there can."""
    for command in ("java", "mvn"):
        if not shutil.which(command):
            return f"no Flink: there is no {command}"
    with locked(HERE / "jars.lock"):
        return _fetch_distribution() or _fetch_jars()


def _run(command: Sequence[str]) -> str:
    """Returns '' or what went wrong."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr)[-500:] if done.returncode else ""


def _fetch_distribution() -> str:
    if DISTRIBUTION.is_dir():
        return ""
    new = HERE / "distribution.new"
    shutil.rmtree(new, ignore_errors=True)
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(new), _PACKAGE]
    if fault := _run(fetch):
        return f"no Flink: pip cannot fetch it: {fault}"
    (archive,) = new.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(new, filter="data")
    archive.unlink()
    (deps,) = new.glob("*/deps")
    deps.rename(DISTRIBUTION)
    shutil.rmtree(new)
    return ""


def _fetch_jars() -> str:
    if JARS.is_dir():
        return ""
    new = HERE / "jars.new"
    shutil.rmtree(new, ignore_errors=True)
    # Each of them holds what it needs: what Maven would add is there twice, or is in the distribution.
    command = ["mvn", "-q", "-B", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies"]
    if fault := _run([*command, "-Plocal", f"-DoutputDirectory={new}", "-DexcludeTransitive=true"]):
        return f"no Flink: Maven cannot fetch the connectors: {fault}"
    new.rename(JARS)
    return ""


def rendered(files: Sequence[str | Path], variables: Mapping[str, str]) -> str:
    """Returns SQL files one after another, `${NAME}` replaced; a name without a folder is looked for in this one.

    Raises:
        KeyError: There is nothing that stands for a variable.
    """
    text = "\n".join((HERE / file).read_text() for file in files)
    return re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], text)


class Cluster:
    """One JobManager, one TaskManager, and a client for SQL."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        """Writes its configuration and picks its ports. `settings` go over those that it needs."""
        self.folder = folder.absolute()
        for name in ("conf", "log", "checkpoints", "temporary"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        every = {
            "jobmanager.rpc.address": "127.0.0.1",
            "jobmanager.rpc.port": str(free_port()),
            "jobmanager.bind-host": "127.0.0.1",
            "blob.server.port": str(free_port()),
            "taskmanager.host": "127.0.0.1",
            "taskmanager.bind-host": "127.0.0.1",
            "rest.address": "127.0.0.1",
            "rest.bind-address": "127.0.0.1",
            "rest.port": str(self.port),
            "io.tmp.dirs": str(self.folder / "temporary"),
            # What the distribution's scripts would work out from one total.
            "taskmanager.cpu.cores": "2",
            "taskmanager.memory.task.heap.size": "640m",
            "taskmanager.memory.framework.heap.size": "64m",
            "taskmanager.memory.task.off-heap.size": "64m",
            "taskmanager.memory.framework.off-heap.size": "64m",
            "taskmanager.memory.network.min": "64m",
            "taskmanager.memory.network.max": "64m",
            "taskmanager.memory.managed.size": "128m",
            "taskmanager.memory.jvm-metaspace.size": "256m",
            "taskmanager.memory.jvm-overhead.min": "128m",
            "taskmanager.memory.jvm-overhead.max": "128m",
            "taskmanager.numberOfTaskSlots": "4",
            "taskmanager.network.sort-shuffle.min-buffers": "16",
            "parallelism.default": "1",
            "execution.checkpointing.interval": "1s",
            "execution.checkpointing.mode": "EXACTLY_ONCE",
            "execution.checkpointing.dir": f"file://{self.folder}/checkpoints",
            # Kept, so that a job goes on after the JobManager was killed: there is no second one here.
            "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
            "restart-strategy.type": "fixed-delay",
            "restart-strategy.fixed-delay.attempts": "1000",
            "restart-strategy.fixed-delay.delay": "1s",
            "heartbeat.interval": "1000",
            "heartbeat.timeout": "10000",
            "table.local-time-zone": "UTC",
        } | dict(settings or {})
        conf = self.folder / "conf"
        (conf / "config.yaml").write_text("".join(f'{name}: "{value}"\n' for name, value in every.items()))
        (conf / "log4j.properties").write_text(_LOGGING)

    def start(self) -> None:
        """Starts both, and returns when the TaskManager's slots are there.

        Raises:
            RuntimeError: It did not start.
        """
        self.start_jobmanager()
        self.start_taskmanager()

    def start_jobmanager(self) -> None:
        """Starts the JobManager, and returns when it answers."""
        self._spawn("jobmanager", "512m", "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint")
        self._wait("jobmanager", lambda: "taskmanagers" in self.get("/overview"))

    def start_taskmanager(self) -> None:
        """Starts the TaskManager, and returns when the JobManager has its slots."""
        name = f"taskmanager-{time.time_ns()}"  # one that was killed is listed until its heartbeats are missed
        main = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
        self._spawn("taskmanager", "704m", main, f"-Dtaskmanager.resource-id={name}")
        self._wait("taskmanager", lambda: any(one["id"] == name for one in self.get("/taskmanagers")["taskmanagers"]))

    def pid(self, name: str) -> int:
        """Returns the process of `jobmanager` or `taskmanager`."""
        return int((self.folder / name / "pid").read_text())

    def get(self, path: str) -> Any:
        """Returns what the JobManager's REST interface answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    def kill(self, name: str) -> None:
        """Ends `jobmanager` or `taskmanager` with SIGKILL, and returns when it is gone."""
        end_process(self.pid(name), signal.SIGKILL)

    def stop(self) -> None:
        """Ends both. Nothing is lost that a checkpoint holds."""
        for name in ("taskmanager", "jobmanager"):
            if (self.folder / name / "pid").exists():
                self.kill(name)

    def sql(self, text: str, timeout_s: float = 120.0) -> list[str]:
        """Runs SQL as the SQL client does: statement by statement, queries that do not end as jobs of the cluster.

        Args:
            text: The statements.
            timeout_s: So long it may take.

        Returns:
            Ids of the jobs that were begun.

        Raises:
            RuntimeError: A statement failed.
            subprocess.TimeoutExpired: It took too long.
        """
        script = self.folder / "script.sql"
        script.write_text(text)
        classes = f"{_CLASSES}:{DISTRIBUTION}/opt/*"
        client = [*self._java("client", "400m"), "-cp", classes, "org.apache.flink.table.client.SqlClient"]
        done = subprocess.run(
            [*client, "embedded", "-hist", str(self.folder / "history"), "-f", str(script)],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        (self.folder / "log" / "client.out").write_text(done.stdout)
        if done.returncode or "[ERROR]" in done.stdout:
            raise RuntimeError(f"SQL failed: {done.stdout[-3000:]}")
        return re.findall(r"^Job ID: ([0-9a-f]{32})$", done.stdout, re.MULTILINE)

    def checkpointed(self, job: str, timeout_s: float = 60.0) -> str:
        """Waits for a checkpoint that begins from now on, and returns its path.

        Raises:
            RuntimeError: There is none so long.
        """
        begin_ms, until = time.time() * 1000, time.monotonic() + timeout_s
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                last = self.get(f"/jobs/{job}/checkpoints")["latest"]["completed"]
                if last and last["trigger_timestamp"] >= begin_ms:
                    return last["external_path"]
            time.sleep(0.05)
        raise RuntimeError(f"no checkpoint of {job} in {timeout_s} s: {self.get(f'/jobs/{job}/exceptions')}")

    def last_checkpoint(self, job: str) -> str:
        """Returns the path of a job's last checkpoint on the disk: also where no JobManager knows of it any more.

        Raises:
            FileNotFoundError: It has none.
        """
        found = [path.parent for path in (self.folder / "checkpoints" / job).glob("chk-*/_metadata")]
        if not found:
            raise FileNotFoundError(f"no checkpoint of {job}")
        return f"file://{max(found, key=lambda path: int(path.name.removeprefix('chk-')))}"

    def cancel(self, job: str) -> None:
        """Ends a job, and returns when it has ended."""
        address = f"http://127.0.0.1:{self.port}/jobs/{job}"
        with urllib.request.urlopen(urllib.request.Request(address, method="PATCH"), timeout=10):
            pass
        while self.get(f"/jobs/{job}")["state"] not in ("CANCELED", "FAILED", "FINISHED"):
            time.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        return os.environ | {"FLINK_CONF_DIR": str(self.folder / "conf")}

    def _java(self, name: str, memory: str) -> list[str]:
        log = self.folder / "log" / f"{name}.log"
        return [*_JAVA, f"-Xmx{memory}", f"-Dlog.file={log}", f"-Dlog4j.configurationFile={self.folder}/conf/log4j.properties"]

    def _spawn(self, name: str, memory: str, main: str, *more: str) -> None:
        command = [*self._java(name, memory), "-cp", _CLASSES, main, "--configDir", str(self.folder / "conf"), *more]
        (self.folder / name).mkdir(exist_ok=True)
        start_watched(command, self.folder / name, self.folder / "log" / f"{name}.out", ending="KILL")
        while not (self.folder / name / "pid").exists():
            time.sleep(0.01)

    def _wait(self, name: str, ready: Any) -> None:
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError, urllib.error.URLError):
                if ready():
                    return
            time.sleep(0.1)
        log = self.folder / "log" / f"{name}.log"
        raise RuntimeError(f"the {name} did not start: {log.read_text()[-2000:] if log.exists() else ''}")


def main() -> None:
    """Runs the jobs of SQL files until it is interrupted."""
    parser = argparse.ArgumentParser(description="Runs SQL files on a Flink cluster of this machine until it is interrupted.")
    parser.add_argument("folder", type=Path, help="for the cluster: its logs, its checkpoints")
    parser.add_argument("files", nargs="+", help="SQL; a name without a folder is one of launch/flink")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="what stands for ${NAME} in them")
    arguments = parser.parse_args()
    if why := missing():
        raise SystemExit(why)
    cluster = Cluster(arguments.folder)
    try:
        cluster.start()
        variables = dict(one.split("=", 1) for one in arguments.set)
        jobs = cluster.sql(rendered(arguments.files, variables))
        print(f"jobs {', '.join(jobs)}: http://127.0.0.1:{cluster.port}", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
