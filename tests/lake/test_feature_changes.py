"""The features tables are followed past errors, and past what expired."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from monolith_jax.lake.changelog import Changelog
from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.feature_changes import FeatureChanges, Following
from monolith_jax.lake.jobs import TidyConfig
from monolith_jax.lake.tidy import expire
from tests.lake.lake_of import Lake, make_lake

AT_ONCE = TidyConfig(retention_s=0.0, keep=1, orphan_s=0.0)


def upsert(lake: Lake, epoch: int, time_ms: int, countries: dict[int, str]) -> None:
    with closing(TableWriter(lake.warehouse, "user_features", "one")) as writer:
        rows = [{"user_id": user, "profile_ms": time_ms, "country": country} for user, country in countries.items()]
        writer.write(pa.Table.from_pylist(rows, writer.schema))
        writer.commit(epoch, {"epoch": epoch})


def countries(changes: Following) -> dict[int, str]:
    """Returns what both tables' turns bring."""
    rows = [row for _ in range(2) for _, batch in next(changes) for row in batch.to_pylist()]
    return {row["user_id"]: row["country"] for row in rows}


def test_what_was_there_comes_and_then_each_change(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    upsert(lake, 0, 10, {1: "at", 2: "de"})
    changes = FeatureChanges(lake.warehouse)
    whole = [(subject, row["country"]) for found in changes.whole() for subject, batch in found for row in batch.to_pylist()]
    assert sorted(whole) == [("user", "at"), ("user", "de")]
    following = changes.follow(0.001)
    assert countries(following) == {}
    upsert(lake, 1, 11, {2: "ch"})
    assert countries(following) == {2: "ch"}


def test_an_error_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = make_lake(tmp_path)
    following = FeatureChanges(lake.warehouse).follow(0.001)
    upsert(lake, 0, 10, {1: "at"})

    def away(self: Any) -> Any:
        raise OSError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(Changelog, "poll", away)
        for _ in range(3):
            with pytest.raises(OSError, match="away"):
                next(following)
    upsert(lake, 1, 11, {2: "de"})
    assert countries(following) == {1: "at", 2: "de"}


def test_who_was_away_for_too_long_reads_what_the_table_holds(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    following = FeatureChanges(lake.warehouse).follow(0.001)
    for epoch, country in enumerate(("at", "ch", "de")):
        upsert(lake, epoch, 10 + epoch, {1: country, 10 + epoch: country})
    assert expire(lake.warehouse, "user_features", AT_ONCE)[0] > 0
    assert countries(following) == {1: "de", 10: "at", 11: "ch", 12: "de"}
    upsert(lake, 3, 13, {1: "fr"})
    assert countries(following) == {1: "fr"}
