"""Starts the HDFS that benchmarks and tests talk to: Apache's own, a name node and a data node in one process on 127.0.0.1.

In: a folder. Out: an `HdfsServer` with two addresses: the native protocol's, and WebHDFS's. The jars are fetched once by Maven,
into `launch/bench/hdfs_jars`.
"""

import signal
import time
from pathlib import Path

from launch.bench.kafka_broker import end_process, fetched, free_port, start_watched

HERE = Path(__file__).parent
POM, JARS = HERE / "hdfs_server.pom.xml", HERE / "hdfs_jars"
REQUIRED = "MONOLITH_JAX_REQUIRE_HDFS"


def missing() -> str:
    """Fetches the jars unless they are there; returns why there can be no server, '' if there can."""
    return fetched("HDFS", POM, JARS, "hadoop-client-minicluster*.jar")


class HdfsServer:
    """One server. What it was told to keep outlives `kill`; `start` then goes on at the same address."""

    def __init__(self, folder: Path) -> None:
        """Makes its folder and picks its ports."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port, self.web_port = folder, free_port(), free_port()
        while self.web_port == self.port:
            self.web_port = free_port()

    @property
    def url(self) -> str:
        """Address of the native protocol."""
        return f"hdfs://127.0.0.1:{self.port}"

    @property
    def web_url(self) -> str:
        """Address of WebHDFS."""
        return f"webhdfs://127.0.0.1:{self.web_port}"

    @property
    def pid(self) -> int:
        """Process of the server."""
        return int((self.folder / "pid").read_text())

    def start(self) -> None:
        """Starts it, and returns when it takes files.

        Raises:
            RuntimeError: It does not start.
        """
        ready, log = self.folder / "ready", self.folder / "server.log"
        ready.unlink(missing_ok=True)
        java = ["java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS}/*"]
        quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
        ports = [str(self.port), str(self.web_port)]
        start_watched([*java, quiet, str(HERE / "HdfsServer.java"), str(self.folder), *ports], self.folder, log)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if ready.exists():
                return
            time.sleep(0.1)
        raise RuntimeError(f"HDFS did not start: {log.read_text()[-2000:]}")

    def stop(self) -> None:
        """Lets it end in its own way."""
        end_process(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        end_process(self.pid, signal.SIGKILL)
