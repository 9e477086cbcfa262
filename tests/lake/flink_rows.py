"""Rows of a lake's tables for both engines, and what has to come of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.tables import GROUPS, events_schema, features_schema
from monolith_jax.lake.warehouse import WarehouseConfig

Row = Mapping[str, Any]
SCHEMAS = {"events": events_schema(), "user_features": features_schema("user")}
_TYPES = {pa.int64(): "BIGINT", pa.int32(): "INT", pa.string(): "STRING", pa.list_(pa.int64()): "ARRAY<BIGINT>"}


def _profile(user: int, time_ms: int, country: str | None, age: int | None) -> Row:
    return {"user_id": user, "profile_ms": time_ms, "country": country, "age": age}


def _activity(user: int, time_ms: int, video: int, tags: list[int] | None) -> Row:
    return {"user_id": user, "activity_ms": time_ms, "last_video_id": video, "last_tag_id": tags}


STEPS: tuple[Sequence[Row], ...] = (
    [_profile(user, 100, f"c{user}", user) for user in range(7)],
    # One of another group, an older one, nulls, one of the same time, one that is new.
    [
        _activity(0, 50, 7, [1, 2]),
        _profile(1, 99, "old", 1),
        _profile(2, 101, None, None),
        _profile(3, 100, "same", None),
        _activity(9, 1, 1, None),
    ],
    [_profile(4, 200, "third", 4), _activity(0, 49, 3, [3]), _activity(4, 2**53 + 1, 2**62, [2**62])],
    [_profile(5, 300, "fourth", None), _activity(4, 2**53, 0, None)],
)
"""What is written to `user_features`, one after the other."""


def full(row: Row, name: str) -> dict[str, Any]:
    """Returns a row with all columns of a table."""
    return {field.name: row.get(field.name) for field in SCHEMAS[name]}


def merged(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns what rows of `user_features` make, in the order of the ids: per group, the last one that is not older counts."""
    held: dict[int, dict[str, Any]] = {}
    for row in rows:
        one = held.setdefault(row["user_id"], full({"user_id": row["user_id"]}, "user_features"))
        for group in GROUPS["user"]:
            time_ms, before_ms = row.get(group.time_column), one[group.time_column]
            if time_ms is not None and (before_ms is None or time_ms >= before_ms):
                one |= {name: row.get(name) for name in (group.time_column, *(column for column, _ in group.columns))}
    return [held[user] for user in sorted(held)]


def events_of_step(step: int) -> list[dict[str, Any]]:
    """Returns what is written to `events` in a step."""
    place = {"day": "2026-11-28", "topic": "impressions", "log_partition": step}
    event = {"event_time_ms": 1, "user_id": 2**62, "video_id": -1, "duration_ms": None}
    return [full(place | event | {"log_offset": at, "tag_id": [None, [], [1, 2]][at]}, "events") for at in range(3)]


def expected_of(steps: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each table after so many steps."""
    return {
        "events": [row for step in range(steps) for row in events_of_step(step)],
        "user_features": merged([row for step in STEPS[:steps] for row in step]),
    }


def write(warehouse: WarehouseConfig, step: int) -> None:
    """Writes a step as the commands of the lake do."""
    for name, rows in (("events", events_of_step(step)), ("user_features", STEPS[step])):
        writer = TableWriter(warehouse, name, f"step {step}")
        writer.write(pa.Table.from_pylist([full(row, name) for row in rows], schema=SCHEMAS[name]))
        writer.commit(0, {})
        writer.close()


def _literal(value: Any, kind: pa.DataType) -> str:
    if isinstance(value, list):
        # There is no array literal without items.
        items = ", ".join(f"CAST({one} AS BIGINT)" for one in value)
        return f"ARRAY[{items}]" if value else "CAST(JSON_QUERY('[]', '$' RETURNING ARRAY<STRING>) AS ARRAY<BIGINT>)"
    text = "NULL" if value is None else f"'{value}'"
    return f"CAST({text} AS {_TYPES[kind]})"


def head_sql(folders: Mapping[str, WarehouseConfig]) -> str:
    """Returns the statements that come first: each insert is waited for, and fails for good; warehouses by their catalogs."""
    settings = {"execution.runtime-mode": "batch", "table.dml-sync": "true", "restart-strategy.type": "none"}
    text = "".join(f"SET '{name}' = '{value}';\n" for name, value in settings.items())
    for catalog, config in folders.items():
        text += f"CREATE CATALOG {catalog} WITH ('type' = 'paimon', 'warehouse' = '{config.path}');\n"
    return text


def compact_sql(catalogs: Sequence[str], *names: str) -> str:
    """Returns the statements by which Flink makes one file of many."""
    text = ""
    for catalog in catalogs:
        text += f"USE CATALOG {catalog};\n"
        for name in names:
            how = "compact_strategy => 'full', options => 'compaction.min.file-num=2'"
            text += f"CALL sys.compact(`table` => 'lake.{name}', {how});\n"
    return text


def _at_once(inserts: Sequence[str]) -> str:
    return "EXECUTE STATEMENT SET\nBEGIN\n" + "".join(f"{one};\n" for one in inserts) + "END;\n"


def insert_sql(catalogs: Sequence[str], step: int) -> str:
    """Returns the statement by which Flink writes a step. Its rows have no order: no step has two for one user and group."""
    inserts = []
    for name, rows in (("events", events_of_step(step)), ("user_features", STEPS[step])):
        values = [[_literal(full(row, name)[field.name], field.type) for field in SCHEMAS[name]] for row in rows]
        selects = " UNION ALL ".join(f"SELECT {', '.join(row)}" for row in values)
        inserts += [f"INSERT INTO {catalog}.lake.{name} {selects}" for catalog in catalogs]
    return _at_once(inserts)


def read_sql(folders: Mapping[str, Path]) -> str:
    """Returns the statements by which Flink writes what it reads, by catalog, to JSON files of folders."""
    tables, inserts = "", []
    for catalog, folder in folders.items():
        for name, schema in SCHEMAS.items():
            columns = ", ".join(f"`{field.name}` {_TYPES[field.type]}" for field in schema)
            out, path = f"{folder.name}_{name}", folder / name
            connector = f"'connector' = 'filesystem', 'path' = '{path}', 'format' = 'json'"
            tables += f"CREATE TEMPORARY TABLE {out} ({columns}) WITH ({connector});\n"
            inserts.append(f"INSERT INTO {out} SELECT * FROM {catalog}.lake.{name}")
    return tables + _at_once(inserts)


def rows_in(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns what Flink has read, by table, in order."""
    found = {}
    for name in SCHEMAS:
        files = [one for one in (folder / name).rglob("*") if one.is_file() and not one.name.startswith((".", "_"))]
        found[name] = in_order([json.loads(line) for one in files for line in one.read_text().splitlines()])
    return found


def in_order(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns rows in the order of their ids or places."""
    return sorted(map(dict, rows), key=lambda row: (row["user_id"], row.get("log_partition", 0), row.get("log_offset", 0)))
