"""The id maps against what the memory allows, against numpy, and against their demands: `python -m launch.bench.ids --help`.

Maps of one table with 64 shards hold random 64-bit ids at the given load. Kernels take turns within one process, each on 2
million fresh ids (slots / 8 where maps are small), in another order every round; medians count. Names:

  limit             hash each id, ask for its first line 48 ids ahead, read one word: what any lookup must do at least
  limit_blocks      the same, block by block, so that hashing is vectorized: stronger
  hit, miss         IdMaps.lookup: ids to shards and rows; ids uniform over those stored, zipf(1.05) over them, or not stored
  touch_zipf        ids to rows with their last-seen written (kernels.find, hashing included)
  insert3_zipf      IdMaps.lookup_or_insert of a zipf batch in which 3 % of the ids are new, each once: ids a second
  insert3_distinct_zipf  the same with the distinct ids of such a batch, a tenth of which are new: distinct ids a second
  unique            ids to distinct ids with counts, last-seen and, as np.unique(return_inverse=True), their index for each id
  unique_by_shard   the same with the index in the order of the shards, which is all that a plan needs
  plan              GroupMapper.plan of [80000, 25] zipf ids with rule seen and a time to live: everything a step needs
  threads2_scaling  plan with two threads over one; compute_threads2_scaling is what the machine gives pure computing: where
                    that is far below 2, others use the cores, and no scaling can be judged

--sustained is apart: 100 million entries, batches of 2 million ids through the whole mapper.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence

DEMANDS: dict[str, tuple[str, float]] = {
    "hit_uniform_over_limit": (">=", 0.75),
    "hit_zipf_over_limit": (">=", 0.75),
    "miss_over_limit": (">=", 0.45),
    "insert3_zipf_over_hit_zipf": (">=", 0.40),
    "unique_over_numpy": (">=", 6.0),
    "plan_over_hit_zipf": (">=", 0.25),
    "threads2_scaling": (">=", 1.7),
    "max_load_reached": (">=", 0.95),
    "bytes_per_entry": ("<=", 20.0),
    "longest_over_median": ("<=", 3.0),
    "filter_false_admit": ("<=", 0.004),
    "filter_missed": ("<=", 0.0005),
    "cold_start_s": ("<=", 6.0),
    "warm_start_s": ("<=", 0.5),
    "peak_rss_gb": ("<=", 4.0),
}
"""What each figure should be at least or at most."""

SUSTAINED_ENTRIES, SUSTAINED_EXAMPLES = 100_000_000, 80_000


def is_met(name: str, value: float | None) -> bool | None:
    """Returns whether a figure is what is demanded of it; None where nothing is demanded, or the figure is missing."""
    if name not in DEMANDS or value is None:
        return None
    relation, bound = DEMANDS[name]
    return value >= bound if relation == ">=" else value <= bound


def rounded(value: float | None) -> float | None:
    """Returns four digits of a figure, all digits of a number from 1000 on."""
    if value is None:
        return None
    return round(value) if abs(value) >= 1000 or value == int(value) else float(f"{value:.4g}")


def measure(slots: int, load: float, threads: int, seconds: float, say: Callable[[str], None]) -> dict[str, float | None]:
    """Returns all figures by name, but for those of --sustained; None: what it needs is not installed.

    Raises:
        ValueError: The maps are too small, or cannot be filled that far.
    """
    from launch.bench.id_once import all_once
    from launch.bench.id_rounds import Rounds

    rounds = Rounds(slots, load, threads)
    figures: dict[str, float | None] = {"slots": rounds.num_slots, "load": rounds.load, "threads": threads}
    figures |= rounds.run(seconds, say)
    del rounds
    return figures | all_once(slots)


def print_table(figures: Mapping[str, float | None], title: str) -> None:
    """Prints figures with what is demanded of them."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "measured", "demand", "", title=title)
    for name, value in figures.items():
        shown = "not installed" if value is None else f"{value:,}"
        demand = f"{DEMANDS[name][0]} {DEMANDS[name][1]:g}" if name in DEMANDS else ""
        met = {True: "met", False: "[bold]missed[/bold]", None: ""}[is_met(name, value)]
        table.add_row(name, shown, demand, met)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.ids",
        description=__doc__,
        epilog="examples:\n  python -m launch.bench.ids --seconds 120\n  python -m launch.bench.ids --sustained",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--slots", type=int, default=2**24, help="places for ids in the maps (default 2^24)")
    parser.add_argument("--load", type=float, default=0.8, help="part of the slots that is taken (default 0.8)")
    parser.add_argument("--threads", type=int, default=1, help="threads of plan_ids_per_s and of --sustained (default 1)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="about how long the rounds take, at least 9 of them (default 60)"
    )
    parser.add_argument("--sustained", action="store_true", help="only 100 million entries, batch after batch")
    arguments = parser.parse_args(argv)
    if arguments.slots < 2**12 or not 0 < arguments.load < 0.85 or arguments.threads < 1:
        parser.error(
            f"expected --slots from {2**12} on, --load above 0 and below 0.85, --threads from 1 on; got {arguments.slots}, "
            f"{arguments.load}, {arguments.threads}"
        )

    def say(line: str) -> None:
        print(line, flush=True)

    if arguments.sustained:
        from launch.bench.id_once import sustained

        figures: dict[str, float | None] = {"threads": arguments.threads}
        figures |= sustained(SUSTAINED_ENTRIES, SUSTAINED_EXAMPLES, arguments.threads, arguments.seconds, say)
    else:
        figures = measure(arguments.slots, arguments.load, arguments.threads, arguments.seconds, say)
    figures = {name: rounded(value) for name, value in figures.items()}
    print_table(figures, "id maps")
    missed = [name for name, value in figures.items() if is_met(name, value) is False]
    print(json.dumps({**figures, "missed": missed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
