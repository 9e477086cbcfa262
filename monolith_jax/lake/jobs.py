"""What the jobs that write and keep the lake are told (`launch.lake`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from monolith_jax.lake.counters import WindowCountsConfig

_PASSWORD = re.compile(r"(^|[\s?&])(ssl)?password\s*=|^\s*\w+://[^:/?@]*:[^/?]*@", re.IGNORECASE)
"""In the address of a database, in either of its forms."""


@dataclass(frozen=True)
class PostgresConfig:
    """Where profiles are."""

    dsn: str
    """Address, as libpq takes it: `host=... user=... dbname=...`. The user has REPLICATION, and may read the tables. A password
    stands in PGPASSWORD or in `~/.pgpass`, not here."""
    user_table: str = "user_profiles"
    """Table of users, `name` or `schema.name`; its REPLICA IDENTITY is FULL. Empty: none."""
    video_table: str = "video_profiles"
    """Table of videos. Empty: none."""
    user_columns: tuple[tuple[str, str], ...] = ()
    """(column of the features, column of the table), where the names differ; the key among them."""
    video_columns: tuple[tuple[str, str], ...] = ()
    """Likewise, of videos."""
    slot: str = "monolith_jax"
    """Replication slot, made when it is needed. While nobody reads it, the server keeps what is written: drop it if it is not
    to be used again."""
    publication: str = "monolith_jax"
    """Publication of both tables, made when there is none."""
    snapshot_ms: int = -1
    """Time of the rows that are there at the start: of their last change the server knows none. -1: that of the start, by the
    server's clock, so that all changes are later, and what the lake may have of before is earlier. 0: they hold since ever."""
    max_rows: int = 10_000
    """Rows of one `ProfileChanges`, about: transactions are whole, however large they are."""
    ignore_truncate: bool = False
    """TRUNCATE, which does not say whose profiles are gone, does nothing. False: it is an error."""
    start_over: bool = False
    """Where the slot is gone, or no longer has what changed since the lake was written, all profiles are read again, with the
    time of then. What was changed in between has no history, and who was deleted in between stays. False: it is an error."""

    def __post_init__(self) -> None:
        """Raises ValueError if the address holds a password."""
        if _PASSWORD.search(self.dsn):
            raise ValueError("PostgresConfig.dsn holds a password, which is read by many: set PGPASSWORD, or write ~/.pgpass")


@dataclass(frozen=True, kw_only=True)
class TidyConfig:
    """What is kept."""

    retention_s: float = 24 * 3600.0
    """Snapshots that are younger stay: who follows a table may be so late, and who reads one may take so long."""
    keep: int = 10
    """So many of the newest stay in any case."""
    orphan_s: float = 24 * 3600.0
    """Files that no snapshot names are removed when they are so old: younger ones may be of an epoch that is being written."""
    target_bytes: int = 128 << 20
    """Files of append tables that are larger stay as they are."""
    most_files: int = 32
    """So many files of a bucket are brought together in any case; from 4 on only where it pays."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        if self.retention_s < 0 or self.keep < 1 or self.orphan_s < 0 or self.target_bytes < 1:
            raise ValueError(f"TidyConfig: keep and target_bytes of at least 1, and no negative time, got {self}")


@dataclass(frozen=True, kw_only=True)
class LakeJobsConfig:
    """How the lake is written and kept."""

    commit_s: float = 1.0
    """Time between two commits of `ingest` and `examples`: how late a reader sees an event, at least."""
    out_of_order_s: float = 5.0
    """`ingest`: a window of counts is told of so long after its end, in event time; what comes later is late."""
    counts: WindowCountsConfig = field(default_factory=WindowCountsConfig)
    """`ingest`: how much is counted of videos."""
    postgres: PostgresConfig | None = None
    """`profiles`: where the profiles of users and videos are; None: nowhere."""
    tidy: TidyConfig = field(default_factory=TidyConfig)
    """`tidy`: what is kept."""
    tidy_every_s: float = 60.0
    """`tidy`: time between two rounds."""
    agreement_rows: int = 1_000_000
    """`agreement`: users, and videos, whose features are held."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        for name in ("commit_s", "tidy_every_s", "agreement_rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"LakeJobsConfig.{name} must be above 0, got {getattr(self, name)}")
        if self.out_of_order_s < 0:
            raise ValueError(f"LakeJobsConfig.out_of_order_s must be at least 0, got {self.out_of_order_s}")
