"""Online against frozen on the drifting world: prequential AUC gap. `python -m launch.bench.frozen --help`.

The model of the quickstart learns a synthetic world for some days of its time. Then it goes on over the same further days in
two ways. Frozen: the snapshot only scores; new ids get no rows; histories of users go on, as they would in production. Online:
each example is scored, then learned from. The world knows its true probabilities, so the best possible AUC stands beside both.

The world is the quickstart's as it is: users come and go, videos live for eight days, tastes turn in fourteen. What of it makes
the gap, the flags tell: without arrivals (`--videos_per_day 0 --users_per_day 0`), without drift (`--drift_days 1e6`), or with
neither, where what is left is that the online model has learned from more examples.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLE = "example: python -m launch.bench.frozen --workdir /tmp/frozen --seed 0 1 2"
GIN_FILE = "configs/quickstart.gin"
WAYS = ("frozen", "online")
Figures = dict[str, Any]


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.frozen",
        description="Online against frozen on the drifting world: prequential AUC gap.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder for runs and plots; its subfolders are replaced")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="worlds; of several, mean and spread (default: 0)")
    steps = "steps of 512, 675 are 4 days: "
    parser.add_argument("--learn_steps", type=int, default=675, help=f"{steps}learned by both (default: %(default)s)")
    parser.add_argument("--more_steps", type=int, default=675, help=f"{steps}compared (default: %(default)s)")
    drift = "days in which a taste turns into another (default: %(default)s)"
    parser.add_argument("--drift_days", type=float, default=14.0, help=drift)
    parser.add_argument("--videos_per_day", type=float, default=120.0, help="of 1000 alive (default: %(default)s)")
    parser.add_argument("--users_per_day", type=float, default=100.0, help="of 2000 alive (default: %(default)s)")
    parser.add_argument("--period_h", type=float, default=12.0, help="hours of event time in a period (default: %(default)s)")
    parser.add_argument("--head", default="complete", help="whose periods are shown and drawn (default: %(default)s)")
    parser.add_argument("--gin", action="append", default=[], metavar="NAME=VALUE", help="a further binding; may be repeated")
    asked = parser.parse_args(argv)
    if min(asked.learn_steps, asked.more_steps) < 1:
        parser.error("--learn_steps and --more_steps must be 1 at least")
    return asked


def _experiment(asked: argparse.Namespace, seed: int) -> Any:
    from monolith_jax.experiment import load

    bound = {
        "SyntheticConfig.seed": seed,
        "SyntheticConfig.drift_days": asked.drift_days,
        "SyntheticConfig.videos_per_day": asked.videos_per_day,
        "SyntheticConfig.users_per_day": asked.users_per_day,
        "TrainConfig.steps": asked.learn_steps,
        "SnapshotConfig.period_steps": 0,
        "PrequentialConfig.period_s": 3600.0 * asked.period_h,
    }
    overrides = [*(f"{name} = {value}" for name, value in bound.items()), *asked.gin]
    size = load([GIN_FILE], overrides).train.batch_size
    # The same for all three runs: a snapshot goes on with the source that it was made with only.
    length = (asked.learn_steps + asked.more_steps) * size
    return load([GIN_FILE], [*overrides, f"SyntheticConfig.num_examples = {length}"])


def go_on(experiment: Any, learned: Path, folder: Path, way: str) -> dict[str, dict[str, Any]]:
    """Goes on from the last snapshot of a run to the end of the source, frozen or online; writes metrics.jsonl.

    Args:
        experiment: The run.
        learned: Its folder.
        folder: For the metrics.
        way: One of `WAYS`.

    Returns:
        The totals of each head over what came after the snapshot.
    """
    from rich.console import Console

    from launch.identity import identity
    from launch.readers import make_readers
    from launch.run import assemble
    from monolith_jax.evaluate.prequential import Prequential
    from monolith_jax.planner import Observed, Planner
    from monolith_jax.snapshot import SnapshotConfig, Snapshots
    from monolith_jax.train.log import RunLog
    from monolith_jax.train.loop import predict, run
    from monolith_jax.train.step import make_predict_step, make_train_step

    folder.mkdir(parents=True)
    parts = assemble(experiment)
    snapshots = Snapshots(SnapshotConfig(), learned / "snapshots", read_only=True)
    step = snapshots.latest()
    assert step is not None, "the first run saves its last step"
    restored = snapshots.restore(step, parts.tiers.like(parts.state), identity(experiment))
    snapshots.close()
    readers = make_readers(experiment, experiment.source, parts.partitions, parts.memories, folder)
    planner = Planner(parts.model, readers, parts.mapper, insert=way == "online")
    planner.set_state(restored.host)
    state = parts.tiers.split(restored.state)
    measures = Prequential(experiment.prequential, [(head.label, head.kind) for head in experiment.heads])
    log = RunLog(folder, measures, 1_000_000, console=Console(quiet=True))

    def observe(seen: Observed, scores: Any) -> None:
        log.write(measures.add(seen.event_time_ms, seen.groups, scores, seen.labels, seen.masks, seen.optimal))

    try:
        if way == "online":
            run(state, planner, make_train_step(parts.model), log, lambda state, frozen: None, parts.tiers)
        else:
            predict(state, planner, make_predict_step(parts.model), observe, parts.tiers)
    finally:
        planner.close()
    return log.close_measures()


def periods_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each binary head by rising event time, with `learned`: how far from the mean to the best log-loss."""
    from monolith_jax.evaluate.metrics import entropy
    from monolith_jax.evaluate.report import read

    found: dict[str, list[dict[str, Any]]] = {}
    for row in read(folder).periods:
        if row["positives"] is None:
            continue
        base = entropy(row["positives"] / row["examples"])
        best, reached = row["optimal_log_loss"], row["log_loss"]
        learned = (base - reached) / (base - best) if base > best else None
        found.setdefault(row["head"], []).append({**row, "learned": learned})
    return found


def _check_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuses two ways that did not see the same examples: labels and best possible scores tell."""
    for head, rows in one.items():
        for row, twin in zip(rows, other[head], strict=True):
            if differing := [name for name in ("examples", "positives", "optimal_auc") if row[name] != twin[name]]:
                raise RuntimeError(f"{head}: the two ways differ in {', '.join(differing)}; they must see the same examples")


def figures_of(totals: Mapping[str, Any], periods: Mapping[str, Any], head: str) -> Figures:
    """Returns the figures of one world.

    Args:
        totals: By way and head.
        periods: By way, head and period, from `periods_of`.
        head: Whose gap is told by period.
    """
    frozen, online = (periods[way] for way in WAYS)
    names = [name for name in frozen if totals["frozen"][name]["auc"] is not None]
    figures: Figures = {f"auc_{way}": {name: totals[way][name]["auc"] for name in names} for way in reversed(WAYS)}
    figures["auc_best"] = {name: totals["online"][name]["optimal_auc"] for name in names}
    figures |= {f"learned_{way}": {name: totals[way][name]["learned"] for name in names} for way in reversed(WAYS)}
    gap = figures["gap"] = {name: figures["auc_online"][name] - figures["auc_frozen"][name] for name in names}
    # The first and the last period may be cut short by where the steps begin and end.
    most = max(row["examples"] for row in frozen[head])
    whole = [index for index, row in enumerate(frozen[head]) if 4 * row["examples"] >= most]
    by_period = [_mean_gap([(frozen[name][index], online[name][index]) for name in names]) for index in whole]
    figures |= {"gap_mean": statistics.fmean(gap.values()), "gap_first_period": by_period[0]}
    figures |= {"gap_last_period": by_period[-1], "gap_mean_by_period": by_period}
    pairs = zip(frozen[head], online[head], strict=True)
    return figures | {f"gap_{head}_by_period": [_mean_gap([pair]) for pair in pairs]}


def _mean_gap(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> float:
    """Returns the mean of online less frozen AUC over pairs of rows; NaN where none has both classes."""
    gaps = [online["auc"] - frozen["auc"] for frozen, online in pairs if frozen["auc"] is not None]
    return statistics.fmean(gaps) if gaps else math.nan


def one_world(asked: argparse.Namespace, seed: int, say: Callable[[str], None]) -> Figures:
    """Learns a world, goes on in both ways, prints tables and draws the plot; returns the figures."""
    from rich.console import Console

    from launch.run import train

    experiment, workdir = _experiment(asked, seed), asked.workdir.absolute() / f"seed{seed}"
    shutil.rmtree(workdir, ignore_errors=True)
    began = time.monotonic()
    train(experiment, workdir / "learned", Console(quiet=True))
    said = f"seed {seed}: learned {asked.learn_steps} steps in {time.monotonic() - began:.0f} s"
    totals, periods = {}, {}
    for way in WAYS:
        began = time.monotonic()
        totals[way] = go_on(experiment, workdir / "learned", workdir / way, way)
        periods[way] = periods_of(workdir / way)
        said += f", {asked.more_steps} more {way} in {time.monotonic() - began:.0f} s"
    _check_same(periods["frozen"], periods["online"])
    if asked.head not in periods["frozen"]:
        raise ValueError(f"--head is {asked.head!r}; the binary heads are {', '.join(periods['frozen'])}")
    say(said)
    figures = figures_of(totals, periods, asked.head)
    show_heads(figures, say)
    show_periods(asked.head, periods, say)
    start_ms = experiment.source.start_ms
    if draw(asked.head, periods, start_ms, asked.period_h, workdir / "frozen.png"):
        say(f"plot: {workdir / 'frozen.png'}")
    return figures


def show_heads(figures: Figures, say: Callable[[str], None]) -> None:
    """Prints a row for each head."""
    say(f"{'head':12}{'frozen':>9}{'online':>9}{'gap':>9}{'best':>9}   {'learned, frozen':>15}{'online':>9}")
    for head, gap in figures["gap"].items():
        row = f"{head:12}{figures['auc_frozen'][head]:9.4f}{figures['auc_online'][head]:9.4f}{gap:+9.4f}"
        row += (
            f"{figures['auc_best'][head]:9.4f}   {figures['learned_frozen'][head]:15.1%}{figures['learned_online'][head]:9.1%}"
        )
        say(row)
    say(f"{'mean':30}{figures['gap_mean']:+9.4f}   first period {figures['gap_first_period']:+.4f}, "
        f"last {figures['gap_last_period']:+.4f}")  # fmt: skip


def show_periods(head: str, periods: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Prints a row for each period of one head."""
    say(f"{head + ', from (UTC)':18}{'examples':>9}{'frozen':>9}{'online':>9}{'gap':>9}{'best':>9}   learned, frozen   online")
    for frozen, online in zip(*(periods[way][head] for way in WAYS), strict=True):
        if frozen["auc"] is None or frozen["learned"] is None:
            continue
        day = time.strftime("%m-%d %H:%M", time.gmtime(frozen["period_start_ms"] / 1000))
        row = f"{day:18}{frozen['examples']:9,}{frozen['auc']:9.4f}{online['auc']:9.4f}{online['auc'] - frozen['auc']:+9.4f}"
        say(f"{row}{frozen['optimal_auc']:9.4f}   {frozen['learned']:15.1%}{online['learned']:9.1%}")


def draw(head: str, periods: Mapping[str, Any], start_ms: int, period_h: float, path: Path) -> bool:
    """Draws the AUC of one head by event time: best possible, online, frozen. Returns False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    lines = (("best possible", "online", "optimal_auc", "#5f6b76"), ("online", "online", "auc", "#2563a8"))
    for label, way, name, colour in (*lines, ("frozen", "frozen", "auc", "#d1662b")):
        rows = [row for row in periods[way][head] if row[name] is not None]
        days = [(row["period_start_ms"] - start_ms) / 86_400_000 + period_h / 48 for row in rows]  # The middle.
        style = "--" if way != label else "-"
        axes.plot(days, [row[name] for row in rows], style, color=colour, marker="o", markersize=3.5, label=label)
    axes.set_xlabel("event time, days since the world began")
    axes.set_ylabel(f"AUC of {head}")
    axes.grid(color="#e4e7ea")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def over_worlds(found: Sequence[Figures]) -> Figures:
    """Returns means over worlds; of several also `sd`, the standard deviations of the same figures."""

    def over(of: Callable[[Sequence[float]], float], values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            shared = [name for name in first if all(name in value for value in values)]
            return {name: over(of, [value[name] for value in values]) for name in shared}
        if isinstance(first, list):
            return [over(of, same) for same in zip(*values, strict=True)]
        return round(of(values), 5) if math.isfinite(sum(values)) else None

    means = over(statistics.fmean, found)
    return means | {"sd": over(statistics.stdev, found)} if len(found) > 1 else means


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0."""
    asked = _parsed(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    began = time.monotonic()

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        figures = over_worlds([one_world(asked, seed, say) for seed in asked.seed])
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if "sd" in figures:
        say(f"\nover {len(asked.seed)} worlds: mean (sd)")
        for head, gap in figures["gap"].items():
            sd = figures["sd"]
            cells = [(figures[f"auc_{name}"][head], sd[f"auc_{name}"][head]) for name in ("frozen", "online", "best")]
            say(f"{head:12}" + "".join(f"{mean:9.4f} ({spread:.4f})" for mean, spread in cells) +
                f"   gap {gap:+.4f} ({sd['gap'][head]:.4f})")  # fmt: skip
    names = ("learn_steps", "more_steps", "drift_days", "videos_per_day", "users_per_day", "period_h")
    settings = {"seeds": asked.seed, **{name: getattr(asked, name) for name in names}}
    say(json.dumps(settings | figures | {"seconds": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
