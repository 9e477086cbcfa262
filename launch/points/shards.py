"""How often the served model is synchronised: Algorithm 1 of the Monolith paper (arXiv 2209.07663), and our deltas.

A first part of the stream is learned. The rest is cut in time order into N shards: for each the trained model is copied, the
copy scores the shard, then the model learns it. One training measures every N, since scoring changes nothing:

    step of the rest -> scored by: the copy from before the rest (`batch`), that of each N's shard, the served model (`deltas`)
                     -> learned

`deltas` is the real way: a publisher writes what changed, each second of event time or each step, whichever is rarer, and a
`ServedModel` applies it and scores the examples as requests. All see the same histories and counters, which go on. An id that
is new since the copy was made reads zeros there, as it does when served; so an N of one shard a step differs from
test-then-train in what new ids read: zeros in place of their first value.

In: an experiment whose source is the whole stream, once; its test source is not looked at. Out, of each binary head and their
mean: `auc_<way>` and `log_loss_<way>` over the rest, `gain_<way>` in AUC over `batch`; `shard_auc_<N>` and
`shard_auc_batch_<N>`, means over shards as in the paper's Table 2, and `shard_gain_<N>`, their difference; `auc_<way>` along
`shard`, over the fewest shards. `hours_<N>`: event time between two copies.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.points.judged import BEST, MEAN, Judged, less, mean_of, of_heads
from launch.points.measured import Base, Measured
from monolith_jax.sync.quantise import Format

if TYPE_CHECKING:
    from launch.run import Parts
    from monolith_jax.planner import Planned, Planner
    from monolith_jax.train.state import TrainState

BATCH, DELTAS = "batch", "deltas"


@dataclass(frozen=True)
class ShardsPoint:
    """Learns the first part of a stream, then scores and learns the rest with served copies of several ages."""

    first: float = 5 / 7
    """Share of the examples that is learned before; the paper's five days of seven."""
    passes: int = 1
    """Passes over that part. The rest is learned once."""
    shards: tuple[int, ...] = (10, 50, 100)
    """Numbers N of shards that the rest is cut into; of each a way. At most the steps of the rest."""
    deltas: bool = True
    """Whether the published and served model is measured too."""
    period_s: float = 1.0
    """Seconds of event time between two publications."""
    format: Format = "float16"
    """Of the published vectors."""

    def __post_init__(self) -> None:
        """Raises ValueError where a setting is out of range."""
        if not 0 < self.first < 1:
            raise ValueError(f"ShardsPoint.first must be above 0 and below 1, got {self.first}")
        if self.passes < 1:
            raise ValueError(f"ShardsPoint.passes must be at least 1, got {self.passes}")
        if not self.shards or min(self.shards) < 1 or len(set(self.shards)) < len(self.shards):
            raise ValueError(f"ShardsPoint.shards must be different numbers of at least 1, got {self.shards}")
        if not 0 <= self.period_s < math.inf:
            raise ValueError(f"ShardsPoint.period_s must be 0 or above, got {self.period_s}")


def shard_of(step: int, steps: int, number: int) -> int:
    """Returns the shard, from 0, that a step of the rest belongs to: shards differ by one step at most.

    Args:
        step: From 0.
        steps: Of the rest.
        number: N, at most `steps`.
    """
    return step * number // steps


def run(point: ShardsPoint, base: Base, folder: Path) -> list[Measured]:
    """Returns what was measured.

    Args:
        point: How.
        base: The experiment; its source is the whole stream, once.
        folder: For deltas and dead letters; begun afresh.

    Raises:
        ValueError: A setting is out of range, or the experiment is not one that this can follow.
        FloatingPointError: A loss was not finite.
    """
    from launch.points.first_and_rest import FirstAndRest, sizes
    from launch.points.training import check_experiment
    from launch.process import prepare
    from launch.readers import log_of, open_source
    from launch.run import assemble
    from monolith_jax.planner import Planner
    from monolith_jax.reader import Reader
    from monolith_jax.stream.batcher import batches
    from monolith_jax.stream.dead_letter import DeadLetters

    experiment = base.load()
    check_experiment(experiment, "ShardsPoint")
    if log_of(experiment.source):
        raise ValueError("ShardsPoint reads the first part before the rest: a log has no end, write its examples to files")
    if expiring := [table.name for table in experiment.tables if table.ttl_s]:
        raise ValueError(f"ShardsPoint has copies of rows that stay: set TableConfig.ttl_s of {', '.join(expiring)} to 0")
    prepare(experiment.mesh)
    source, size = open_source(experiment.source), experiment.train.batch_size
    cut = sizes(source, point.first, point.passes, size)
    if max(point.shards) > cut.rest_steps:
        raise ValueError(
            f"ShardsPoint.shards has {max(point.shards)}, but the rest has {cut.rest_steps} steps of {size}: a shard needs one "
            "at least. Lower it, or TrainConfig.batch_size"
        )
    for name in ("deltas", "dead_letters.jsonl"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    parts = assemble(experiment)
    served = None
    if point.deltas:
        from launch.points.followed import Followed

        served = Followed(experiment, parts, folder / "deltas", point.format, point.period_s, cut.first_steps)
    memories = [*parts.memories[0], *([served.witness] if served else [])]
    stream = FirstAndRest(source, cut.first, point.passes)
    reader = Reader(batches(stream, size), memories, DeadLetters(folder / "dead_letters.jsonl"), size)
    planner = Planner(parts.model, [reader], parts.mapper, cuts=served.cuts if served else None)
    judged = Judged(experiment.heads)
    try:
        times_ms = _follow(point, parts, planner, served, (cut.first_steps, cut.rest_steps), judged)
    finally:
        planner.close()
        if served:
            served.close()
    shutil.rmtree(folder / "deltas", ignore_errors=True)
    return list(_measured(point, judged, times_ms, served.versions if served else 0))


def _follow(
    point: ShardsPoint, parts: Parts, planner: Planner, served: Any, steps: tuple[int, int], judged: Judged
) -> list[int]:
    """Learns the first steps, scores and learns the others; returns the first event time of each of these."""
    from launch.points.training import Training
    from monolith_jax.train.step import make_predict_step

    training, predict = Training(parts), make_predict_step(parts.model)
    first, rest = steps
    copies: dict[int, TrainState] = {}  # By the step that they were made at: several N share one where shards begin together.
    made = dict.fromkeys((BATCH, *map(str, point.shards)), -1)
    times_ms: list[int] = []
    for number, planned in enumerate(_checked(planner, first + rest)):
        at = number - first
        if copies and any(freed.rows.size for freed in planned.freed):
            raise ValueError("a table is full, and gave rows of a served copy to other ids: raise TableConfig.max_rows")
        if at >= 0:
            for shards in point.shards:
                if at == 0 or shard_of(at, rest, shards) > shard_of(at - 1, rest, shards):
                    made[str(shards)] = at
            made[BATCH] = 0
            copies = {one: copies[one] if one in copies else training.copy() for one in set(made.values())}
            scores = {one: predict(copy, planned.inputs) for one, copy in copies.items()}
            found = {way: scores[one] for way, one in made.items()}
            if served:
                found[DELTAS] = served.score(planned, training.steps)
            judged.add(planned.observed, training.fetch(found))
            times_ms.append(int(planned.observed.event_time_ms[0]))
        elif served:
            served.pass_over()
        training.step(planned)
        if served:
            served.follow(training.state, planned)
    return times_ms


def _checked(planner: Planner, steps: int) -> Iterator[Planned]:
    """Yields all plans; raises RuntimeError where they are not as many as the cuts were made for."""
    number = 0
    for planned in planner:
        number += 1
        yield planned
    if number != steps:
        raise RuntimeError(f"the stream made {number} steps, {steps} were expected: it changed while it was read")


def _measured(point: ShardsPoint, judged: Judged, times_ms: Sequence[int], versions: int) -> Iterator[Measured]:
    """Yields the figures, in the order in which they are explained above."""
    whole = {way: judged.auc(way) for way in judged.models}
    for way, values in whole.items():
        yield from of_heads(f"auc_{way}", values)
    for way in judged.models:
        yield from of_heads(f"log_loss_{way}", judged.log_loss(way))
    for way, values in whole.items():
        if way not in (BATCH, BEST):
            yield from of_heads(f"gain_{way}", less(values, whole[BATCH]))
    for number in point.shards:
        own, batch = (_mean_over_shards(judged, way, number) for way in (str(number), BATCH))
        yield from of_heads(f"shard_auc_{number}", own)
        yield from of_heads(f"shard_auc_batch_{number}", batch)
        yield from of_heads(f"shard_gain_{number}", less(own, batch))
    for way in judged.models:
        yield from _curve(judged, way, min(point.shards))
    for number in point.shards:
        yield Measured(f"hours_{number}", (times_ms[-1] - times_ms[0]) / 3_600_000 / number)
    yield Measured("steps", len(judged))
    if versions:
        yield Measured("versions", versions)


def _mean_over_shards(judged: Judged, way: str, number: int) -> dict[str, float]:
    """Returns the mean AUC of each head over the shards in which it is defined."""
    found = [judged.auc(way, cut) for cut in _cuts(len(judged), number)]
    return {head: mean_of({str(shard): values[head] for shard, values in enumerate(found)}) for head in judged.heads}


def _curve(judged: Judged, way: str, number: int) -> Iterator[Measured]:
    found = [judged.auc(way, cut) for cut in _cuts(len(judged), number)]
    # Of the same heads in every shard, or the mean would go up and down with which of them are defined.
    always = [head for head in judged.heads if not any(math.isnan(values[head]) for values in found)]
    for shard, values in enumerate(found):
        rows = {**values, MEAN: mean_of({head: values[head] for head in always})}
        yield from (Measured(f"auc_{way}", value, head, "shard", shard) for head, value in rows.items())


def _cuts(steps: int, number: int) -> list[list[int]]:
    """Returns the steps of each shard."""
    cuts: list[list[int]] = [[] for _ in range(number)]
    for step in range(steps):
        cuts[shard_of(step, steps, number)].append(step)
    return cuts
