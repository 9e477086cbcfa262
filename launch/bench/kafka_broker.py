"""Starts the Kafka broker that benchmarks and tests talk to: Apache's own, one node, everything on 127.0.0.1.

In: a folder. Out: a `Broker` with an address. The jars are fetched once by Maven, into `launch/bench/kafka_jars`.
"""

import base64
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
POM, JARS = HERE / "kafka_broker.pom.xml", HERE / "kafka_jars"
REQUIRED = "MONOLITH_JAX_REQUIRE_KAFKA"
_JAVA = ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS}/*"]
# The server ends when it is told to, or with the tests: also when these are killed.
_WATCHED = """
"$@" & server=$!
echo $server > "$FOLDER/new_pid" && mv "$FOLDER/new_pid" "$FOLDER/pid"
while kill -0 $TESTS 2>/dev/null && kill -0 $server 2>/dev/null; do sleep 0.5; done
kill -$ENDING $server 2>/dev/null
wait $server
"""


def free_port() -> int:
    """Returns a port below the ephemeral ones that nobody listens at."""
    while True:
        port = 15000 + int.from_bytes(os.urandom(2)) % 12000
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps the other processes of a test run out."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetched(what: str, pom: Path, jars: Path, one: str) -> str:
    """Fetches the jars of a pom by Maven unless they are there; returns why there can be no such server, '' if there can.

    Args:
        what: What the server is called.
        pom: What it needs.
        jars: Folder of the jars.
        one: Pattern of a jar that must be among them.
    """
    for command in ("java", "mvn"):
        if not shutil.which(command):
            return f"no {what}: there is no {command}"
    with locked(jars.with_name(f"{jars.name}.lock")):
        if jars.is_dir():
            return ""
        new = jars.with_name(f"{jars.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={new}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode or not any(new.glob(one)):
            return f"no {what}: Maven cannot fetch it: {(done.stdout + done.stderr)[-500:]}"
        new.rename(jars)
    return ""


def missing() -> str:
    """Fetches the jars unless they are there; returns why there can be no broker, '' if there can."""
    return fetched("broker", POM, JARS, "kafka_*.jar")


def tests_pid() -> int:
    """Returns the process that all tests of a run belong to."""
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


def start_watched(command: list[str], folder: Path, log: Path, ending: str = "TERM") -> None:
    """Starts a server that ends with the tests; its process is in `folder/pid`, soon. `ending`: the signal that it is sent."""
    (folder / "pid").unlink(missing_ok=True)
    # Two shells: the first ends at once, so the server is nobody's child here, and any process of the run may stop it.
    with log.open("ab") as file:
        subprocess.run(
            ["sh", "-c", f"({_WATCHED}) &", "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            check=True,
            env=os.environ | {"FOLDER": str(folder), "TESTS": str(tests_pid()), "ENDING": ending},
            start_new_session=True,
        )


def end_process(pid: int, how: signal.Signals) -> None:
    """Sends a signal to a server, and returns when it has ended: in half a minute it is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)
    until = time.monotonic() + 30
    while is_running(pid):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


class Broker:
    """One broker. What it was told to keep outlives `kill`; `start` then goes on at the same address."""

    def __init__(self, folder: Path, properties: dict[str, str] | None = None) -> None:
        """Makes its folder and picks its ports. `properties` go over those that it needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        controller = free_port()
        while controller == self.port:
            controller = free_port()
        every = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(folder / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            # One that was killed is let in again once its session is over.
            "broker.session.timeout.ms": "1000",
            "broker.heartbeat.interval.ms": "200",
        } | (properties or {})
        (folder / "server.properties").write_text("".join(f"{name}={value}\n" for name, value in every.items()))

    @classmethod
    def of(cls, folder: Path) -> "Broker":
        """Returns the broker that another process has started in a folder."""
        broker = cls.__new__(cls)
        broker.folder = folder
        lines = (folder / "server.properties").read_text().splitlines()
        (address,) = (line for line in lines if line.startswith("advertised.listeners="))
        broker.port = int(address.rpartition(":")[2])
        return broker

    @property
    def url(self) -> str:
        """Address of the log."""
        return f"kafka://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process of the broker."""
        return int((self.folder / "pid").read_text())

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        properties = str(self.folder / "server.properties")
        if not (self.folder / "data").exists():
            cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            command = [*_JAVA, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", properties]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        command = [*_JAVA[:1], "-Xmx512m", *_JAVA[1:], "kafka.Kafka", properties]
        start_watched(command, self.folder, self.folder / "broker.log")
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"the broker did not start: {(self.folder / 'broker.log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Lets it end in its own way."""
        end_process(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        end_process(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def shared_broker(folder: Path) -> Iterator[Broker]:
    """Gives the broker in a folder to each process that asks: the first one starts it, the last one stops it."""
    where = folder / "broker"
    users = folder / "broker_users"
    with locked(folder / "broker.lock"):
        count = int(users.read_text()) if users.exists() else 0
        if count:
            broker = Broker.of(where)
        else:
            broker = Broker(where)
            broker.start()
        users.write_text(str(count + 1))
    try:
        yield broker
    finally:
        with locked(folder / "broker.lock"):
            count = int(users.read_text()) - 1
            users.write_text(str(count))
            if not count:
                broker.stop()
                shutil.rmtree(where)


def is_running(pid: int) -> bool:
    """Returns whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
