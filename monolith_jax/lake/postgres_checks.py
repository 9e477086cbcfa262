"""What has to be so in PostgreSQL before its changes can be followed, and what is said where it is not.

In: an address, and what is wanted (`PostgresConfig`). Out: connections; where the columns of profiles are; what the replication
slot has. A server that is away is told from one that refuses: psycopg2's own errors are of the first, ValueError of the second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from monolith_jax.lake.jobs import PostgresConfig
from monolith_jax.lake.pgoutput import ProfileTable, identity_missing, profile_of
from monolith_jax.lake.tables import Subject, key_of

try:
    import psycopg2
    from psycopg2 import sql
    from psycopg2.extensions import parse_dsn
    from psycopg2.extras import LogicalReplicationConnection
except ImportError as error:
    raise ImportError("changes of PostgreSQL need the extra `lake`: pip install 'monolith_jax[lake]'") from error

CONNECT_S = 10
"""A server that does not answer so long is away, unless the address has a connect_timeout."""
# At connecting there are no codes: what the server says, or what libpq finds, tells one that is there and does not let us in.
_REFUSED = ("FATAL", "no password supplied", "does not support SSL", "certificate", "invalid")
_PASSING = ("starting up", "shutting down", "recovery", "too many", "connection slots", "max_wal_senders", "terminating")
_LISTS_AND_TEXTS = (25, 1042, 1043, 1016, 1005, 1007)
_PUBLISHED = ("insert", "update", "delete", "truncate")


class Slot(NamedTuple):
    """What the server says of the replication slot."""

    plugin: str
    confirmed: int
    """Changes from here on are told."""
    lost: bool
    """The server has dropped what it was to keep."""
    written: int
    """Where the server is."""


def connect(config: PostgresConfig, strict: bool, replicating: bool = False) -> Any:
    """Connects.

    Args:
        config: Where.
        strict: One that refuses is an error; otherwise it is as one that is away (as one is whose server is being moved).
        replicating: For the stream of changes.

    Raises:
        ValueError: The address is none; or database, user or password are wrong.
        psycopg2.Error: The server is away.
    """
    try:
        parsed = parse_dsn(config.dsn)
    except psycopg2.Error:
        # Not what libpq says of it: that may hold a part of a password.
        raise ValueError("PostgresConfig.dsn is no address as libpq takes it: 'host=... user=... dbname=...'") from None
    factory = LogicalReplicationConnection if replicating else None
    more: dict[str, Any] = {} if "connect_timeout" in parsed else {"connect_timeout": CONNECT_S}
    try:
        # Whatever the database's encoding is: this is UTF-8.
        return psycopg2.connect(config.dsn, connection_factory=factory, client_encoding="UTF8", **more)
    except psycopg2.Error as error:
        said = str(error).strip()
        if strict and any(word in said for word in _REFUSED) and not any(word in said for word in _PASSING):
            raise ValueError(f"PostgreSQL does not let us in: {said}") from error
        raise


def table_of(connection: Any, config: PostgresConfig, subject: Subject) -> ProfileTable:
    """Finds a table and its columns.

    Raises:
        ValueError: It is not there, or not as it has to be.
    """
    name, renamed = (
        (config.user_table, config.user_columns) if subject == "user" else (config.video_table, config.video_columns)
    )
    names = [key_of(subject), *(column for column, _ in profile_of(subject).columns)]
    if unknown := sorted({column for column, _ in renamed} - {*names}):
        raise ValueError(f"PostgresConfig.{subject}_columns: no column of the features is {unknown}; there: {names}")
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT c.oid, n.nspname, c.relname, c.relreplident FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)",
            (name,),
        )
        if (found := cursor.fetchone()) is None:
            raise ValueError(f"PostgresConfig.{subject}_table: PostgreSQL has no table {name!r}")
        oid, schema, plain, identity = found
        cursor.execute(
            "SELECT a.attname, a.atttypid::bigint, EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid "
            "AND a.attnum = ANY (i.indkey) AND CASE %s WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END) "
            "FROM pg_attribute a WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            (identity, oid),
        )
        columns = cursor.fetchall()
    table = ProfileTable(subject, schema, plain, tuple({**{one: one for one in names}, **dict(renamed)}.values()))
    table.places({column: kind for column, kind, _ in columns})
    if identity != "f" and table.columns[0] not in {column for column, _, is_identity in columns if is_identity}:
        raise ValueError(identity_missing(table))
    _check_long_values(connection, table, oid)
    return table


def _check_long_values(connection: Any, table: ProfileTable, oid: int) -> None:
    """Sees to it that each change comes with the values that it left as they were.

    Raises:
        ValueError: Long ones of the table, or of a partition of it, would come without.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT DISTINCT c.oid::regclass::text, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
            "WHERE c.oid IN (SELECT relid FROM pg_partition_tree(%s) WHERE isleaf UNION SELECT %s) AND c.relreplident <> 'f' "
            "AND a.attstorage <> 'p' AND a.attname = ANY (%s) AND a.atttypid = ANY (%s::oid[]) ORDER BY 1, 2",
            (oid, oid, [*table.columns], [*_LISTS_AND_TEXTS]),
        )
        found = cursor.fetchall()
    if found:
        statements = "; ".join(f"ALTER TABLE {name} REPLICA IDENTITY FULL" for name in dict(found))
        columns = ", ".join(dict.fromkeys(column for _, column in found))
        raise ValueError(
            f"table {table.schema}.{table.name}: a change does not tell long values that it left as they were (of {columns}), "
            f"and those of now would be taken for those of then: {statements}"
        )


def publish(connection: Any, config: PostgresConfig, tables: list[ProfileTable]) -> None:
    """Makes the publication unless it is there.

    Raises:
        ValueError: It is there, and does not tell all changes of the tables.
    """
    name = config.publication
    with connection.cursor() as cursor:
        cursor.execute("SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication WHERE pubname = %s", (name,))
        published = cursor.fetchone()
        if published is None:
            named = sql.SQL(", ").join(sql.Identifier(table.schema, table.name) for table in tables)
            statement = sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true)")
            cursor.execute(statement.format(sql.Identifier(name), named))
            return
        # Rows and columns of a table can be chosen since version 15.
        chosen = "rowfilter, attnames" if connection.server_version >= 150000 else "NULL, NULL"
        cursor.execute(f"SELECT schemaname, tablename, {chosen} FROM pg_publication_tables WHERE pubname = %s", (name,))
        there = {(schema, table): more for schema, table, *more in cursor.fetchall()}
    if untold := [what for what, is_told in zip(_PUBLISHED, published, strict=True) if not is_told]:
        if untold != ["truncate"] or not config.ignore_truncate:
            raise ValueError(
                f"publication {name!r} does not tell {', '.join(untold)}: "
                f"ALTER PUBLICATION {name} SET (publish = '{', '.join(_PUBLISHED)}')"
            )
    for table in tables:
        where = f"table {table.schema}.{table.name}"
        if (table.schema, table.name) not in there:
            raise ValueError(f"publication {name!r} does not hold {where}: ALTER PUBLICATION it")
        only, columns = there[table.schema, table.name]
        if only:
            raise ValueError(
                f"publication {name!r} tells of {where} only rows WHERE {only}: ALTER PUBLICATION it, all are needed"
            )
        if columns and (missing := [column for column in table.columns if column not in columns]):
            raise ValueError(f"publication {name!r} does not tell columns {missing} of {where}: ALTER PUBLICATION it")


def slot_of(connection: Any, name: str) -> Slot | None:
    """Returns what the server says of a slot; None: there is none."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT plugin, confirmed_flush_lsn - '0/0'::pg_lsn, coalesce(wal_status = 'lost', false), "
            "pg_current_wal_lsn() - '0/0'::pg_lsn FROM pg_replication_slots WHERE slot_name = %s",
            (name,),
        )
        found = cursor.fetchone()
    if found is None:
        return None
    plugin, confirmed, lost, written = found
    return Slot(plugin, int(confirmed or 0), lost, int(written))


def end_of(connection: Any) -> int:
    """Returns where the server is."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")
        return int(cursor.fetchone()[0])


def gap_behind(slot: Slot | None, position: int) -> str:
    """Returns why changes behind a position cannot all be had, '' if they can."""
    if slot is None:
        return "there is none any longer, and what has changed since is not known"
    if slot.lost:
        return "the server has dropped what it was to keep (max_slot_wal_keep_size)"
    if position > slot.written:
        return f"the server is at {slot.written}, the lake at {position}: the server is another, or an older one"
    return ""
