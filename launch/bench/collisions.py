"""Ids of MovieLens-25M that share a row when they are hashed, and in the id maps: `python -m launch.bench.collisions --help`.

Table 1 of the Monolith paper (arXiv 2209.07663): 162,541 users and 59,047 movies, hashed by MD5 into a million places each,
leave 149,970 and 57,361. Here the ids are 0, 1, 2 and so on, which gives the paper's numbers to the last digit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence

NUM_USERS, NUM_MOVIES = 162_541, 59_047
PLACES = 10**6


def place_of(number: int, places: int = PLACES) -> int:
    """Returns the place of an id, by MD5 of its decimal digits."""
    return int(hashlib.md5(str(number).encode()).hexdigest(), 16) % places


def places_after_hash(num_ids: int, places: int = PLACES) -> int:
    """Returns how many of `places` places the ids 0 to `num_ids` - 1 take."""
    return len({place_of(number, places) for number in range(num_ids)})


def rows_in_maps(num_ids: Sequence[int]) -> list[int]:
    """Returns how many rows the ids 0, 1, ... of each of several tables take in maps that were made for so many."""
    import numpy as np

    from monolith_jax.ids.cuckoo import IdMaps, MapLayout

    layout = MapLayout(tuple(f"table{index}" for index in range(len(num_ids))), tuple(num_ids), 64)
    maps, rows = IdMaps(layout), []
    for table, number in enumerate(num_ids):
        shards, rows_in_shard = maps.lookup_or_insert(np.arange(number), table, np.zeros(number, np.uint32))[:2]
        # A row of the shared array, which is where two ids would meet; what was refused (-1) has none.
        owned = shards.astype(np.int64) * layout.rows_per_shard + layout.row_offsets[table] + rows_in_shard
        rows.append(owned[rows_in_shard >= 0])
    everyone = np.concatenate(rows)
    if np.unique(everyone).size != everyone.size:
        raise ValueError("ids share rows")
    return [int(np.unique(of_table).size) for of_table in rows]


def measure() -> dict[str, int]:
    """Returns the figures by name."""
    users, movies = rows_in_maps((NUM_USERS, NUM_MOVIES))
    users_after, movies_after = places_after_hash(NUM_USERS), places_after_hash(NUM_MOVIES)
    return {
        "users": NUM_USERS,
        "users_after_hash": users_after,
        "users_ours": users,
        "movies": NUM_MOVIES,
        "movies_after_hash": movies_after,
        "movies_ours": movies,
        "collisions_hash": NUM_USERS - users_after + NUM_MOVIES - movies_after,
        "collisions_ours": NUM_USERS - users + NUM_MOVIES - movies,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.collisions",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.collisions",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    figures = measure()
    table = Table("", "ids", "places after MD5", "lost", "rows in our maps", "lost", title="MovieLens-25M")
    for name in ("users", "movies"):
        number, hashed, ours = (figures[name + suffix] for suffix in ("", "_after_hash", "_ours"))
        table.add_row(name, f"{number:,}", f"{hashed:,}", f"{1 - hashed / number:.2%}", f"{ours:,}", f"{1 - ours / number:.2%}")
    Console().print(table)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
