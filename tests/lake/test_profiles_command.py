"""The job that brings profiles in, as a command: it ends when it has all, when it is told to, and not as if all were well."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("pypaimon")
psycopg2 = pytest.importorskip("psycopg2")

from launch import lake as command  # noqa: E402
from launch.bench.postgres_server import PostgresServer  # noqa: E402
from monolith_jax.lake.profiles import WRITER  # noqa: E402
from tests.lake.lake_of import Lake  # noqa: E402
from tests.lake.profile_database import Database, new_database, running_server  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with running_server(tmp_path_factory.mktemp("postgres")) as one:
        yield one


@pytest.fixture
def database(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.chdir(ROOT)
    with new_database(server) as one:
        yield one


def arguments(folder: Path, database: Database, *more: str) -> list[str]:
    of_database = ("--gin.LakeJobsConfig.postgres=@PostgresConfig()", f"--gin.PostgresConfig.slot={database.name}")
    files = ("--gin_file=configs/train_lake.gin", f"--workdir={folder}/work", f"--gin.WAREHOUSE={folder}/warehouse")
    return ["profiles", *files, *of_database, f"--gin.PostgresConfig.dsn={database.dsn!r}", *more]


def test_it_ends_when_it_has_all(tmp_path: Path, database: Database) -> None:
    database.run("INSERT INTO user_profiles SELECT 'x', i, 'de', 'de', 30 FROM generate_series(1, 1000) i")
    assert command.main([*arguments(tmp_path, database), "--until_end"]) == 0
    # The server reads through all that before it has anything to tell.
    database.run("INSERT INTO other SELECT generate_series(1, 1000000)")
    database.run("UPDATE user_profiles SET country = 'fr' WHERE user_id = 1")
    assert command.main([*arguments(tmp_path, database), "--until_end"]) == 0
    rows = {row["user_id"]: row["country"] for row in Lake(tmp_path).rows("user_features")}
    assert len(rows) == 1000 and rows[1] == "fr"


def test_a_database_that_is_not_there_is_an_error(
    tmp_path: Path, database: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_AWAY_S", 2.0)
    assert command.main([*arguments(tmp_path, database), "--until_end", "--postgres=host=127.0.0.1 port=1 user=a"]) == 1
    assert "OSError: PostgreSQL is not there" in capsys.readouterr().err
    for more in ((), ("--until_end",)):
        assert command.main([*arguments(tmp_path, database), *more, f"--postgres={database.dsn} dbname=nowhere"]) == 1
        assert "PostgreSQL does not let us in" in capsys.readouterr().err


def test_a_password_is_refused(tmp_path: Path, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*arguments(tmp_path, database), "--postgres=host=127.0.0.1 password=secret"]) == 1
    (tmp_path / "secret.gin").write_text("PostgresConfig.dsn = 'host=127.0.0.1 password=secret1'")
    some = [one for one in arguments(tmp_path, database) if "PostgresConfig.dsn" not in one]
    assert command.main([*some, f"--gin_file={tmp_path}/secret.gin"]) == 1
    told = capsys.readouterr().err
    assert told.count("PGPASSWORD") == 2 and "password=" not in told


def test_it_ends_when_it_is_told_to_while_it_waits_for_a_transaction(tmp_path: Path, database: Database) -> None:
    with contextlib.closing(psycopg2.connect(database.dsn)) as open_:
        open_.cursor().execute("INSERT INTO other VALUES (1)")
        started = [sys.executable, "-m", "launch.lake", *arguments(tmp_path, database)]
        running = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        query = "SELECT 1 FROM pg_stat_activity WHERE backend_type = 'walsender' AND wait_event_type = 'Lock'"
        until = time.monotonic() + 120
        while not database.run(query) and time.monotonic() < until:
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        try:
            told, _ = running.communicate(timeout=10)
        finally:
            running.kill()
    assert running.returncode == 0 and f"{WRITER} ended: 0 changes" in told, told
