"""What a run tells while it goes: metrics.jsonl, a progress line, TensorBoard files.

In: each step's loss and scores, in order. Out: rows of kind `step` and of kind `period` in `<workdir>/metrics.jsonl`. The
file's length is part of the snapshot: a run that goes on cuts the file to it, so no step stands there twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from monolith_jax.planner import Planned

_TOTALS_EVERY_S = 10.0
_PLAIN_LINE_EVERY_S = 10.0


class Measures(Protocol):
    """What turns scores and labels into metrics along the stream (`evaluate.prequential`)."""

    def add(  # noqa: D102
        self,
        event_time_ms: np.ndarray,
        groups: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray,
        optimal: np.ndarray | None = None,
    ) -> list[dict[str, Any]]: ...
    def close(self) -> list[dict[str, Any]]: ...  # noqa: D102
    def totals(self) -> dict[str, dict[str, Any]]: ...  # noqa: D102
    def get_state(self) -> dict[str, np.ndarray]: ...  # noqa: D102
    def set_state(self, state: Mapping[str, np.ndarray]) -> None: ...  # noqa: D102


class RunLog:
    """The records of a run."""

    def __init__(
        self,
        workdir: Path,
        measures: Measures,
        log_every: int,
        total_examples: int | None = None,
        tensorboard: bool = False,
        console: Console | None = None,
        writes: bool = True,
    ) -> None:
        """Opens the records; nothing is written before the first step.

        Args:
            workdir: The run folder.
            measures: Gets every batch of the first pass over the data, scored before it was trained on.
            log_every: Steps between rows of kind `step`.
            total_examples: What the run will train on, for the time left; None: unknown.
            tensorboard: Whether to write TensorBoard files.
            console: Where the progress line goes.
            writes: Whether this process writes the files; where there are several, one does, and all count.

        Raises:
            ImportError: TensorBoard files are wanted and the extra is not installed.
        """
        self.path = workdir / "metrics.jsonl"
        self._measures = measures
        self._log_every = log_every
        self._total_examples = total_examples
        self._writes = writes
        self._writer = _tensorboard_writer(workdir) if tensorboard and writes else None
        self._console = console or Console()
        self._live = Live(console=self._console, refresh_per_second=4, transient=True) if self._console.is_terminal else None
        self._bytes = 0
        self._step = 0
        self._examples = 0
        self._started = self._last_line = self._last_totals = time.monotonic()
        self._examples_at_start = 0
        self._ages_s: list[np.ndarray] = []
        self.told: dict[str, float] = {}
        """What the live stream told of itself last; empty where there is none."""
        self.also: Callable[[], Mapping[str, Any]] = dict
        """What else there is to tell in rows of kind `step`."""
        self._last_row: tuple[float, int] | None = None
        self._aucs = ""
        self._skipped = 0.0
        self._retrieval = np.zeros((2, 4))
        self.last_snapshot = "none yet"
        """Named when a loss is not finite."""

    def __enter__(self) -> RunLog:
        """Starts the clock and the progress line."""
        self._started = self._last_totals = time.monotonic()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the progress line."""
        if self._live:
            self._live.stop()
        if self._writer:
            self._writer.close()

    @property
    def examples(self) -> int:
        """Examples trained on, those before a restart counted in."""
        return self._examples

    @property
    def steps(self) -> int:
        """Steps done, those before a restart counted in."""
        return self._step

    @property
    def seconds(self) -> float:
        """Seconds since this process began to train."""
        return time.monotonic() - self._started

    @property
    def retrieval(self) -> dict[str, float]:
        """What the two-tower reached over the run; empty without one."""
        return _of_retrieval(self._retrieval[0])

    def step(self, planned: Planned, loss: float, scores: np.ndarray, retrieval: Sequence[np.ndarray] | None = None) -> None:
        """Records a step.

        Args:
            planned: The step.
            loss: Of all that is trained.
            scores: float32 [B, T]
            retrieval: Loss, hits and weight of the two-tower (`models.two_tower.RetrievalLoss`); None: there is none.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        self._step += 1
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self._step} is {loss}; its batch starts at {json.dumps(planned.position)[:2000]} in the "
                f"stream. Last good snapshot: {self.last_snapshot}. Look at the batch, or lower OptimizerConfig.learning_rate"
            )
        self._examples += planned.num_examples
        if "lag_s" in planned.told:  # History tells of other things.
            self._ages_s.append(time.time() - planned.times_ms / 1000)
        if planned.told:
            self._tell_skipped(planned.told.get("skipped_messages", 0.0))
            self.told = planned.told
        observed = planned.observed
        if planned.epoch == 0:
            # Later passes score examples that were trained on already: no test any more.
            rows = self._measures.add(
                observed.event_time_ms, observed.groups, scores, observed.labels, observed.masks, observed.optimal
            )
            self.write(rows)
            if retrieval is not None:
                self._retrieval += (1, *map(float, retrieval))
        if self._step % self._log_every == 0:
            self._write_step(planned, loss)
        self._show(loss)

    def _write_step(self, planned: Planned, loss: float) -> None:
        now = time.monotonic()
        since, examples_then = self._last_row or (self._started, self._examples_at_start)
        rate = (self._examples - examples_then) / max(now - since, 1e-9)
        self._last_row = (now, self._examples)
        row = {
            "kind": "step",
            "step": self._step,
            "examples": self._examples,
            "epoch": planned.epoch,
            "event_time_ms": int(planned.observed.event_time_ms[-1]),
            "loss": round(loss, 6),
            "examples_per_s": round(rate, 1),
            **{name: round(value, 4) for name, value in planned.stats.items()},
            **_of_retrieval(self._retrieval[1]),
            **self._of_live_stream(planned),
            **self.also(),
        }
        self._retrieval[1] = 0
        self.write([row])

    def _of_live_stream(self, planned: Planned) -> dict[str, float]:
        """Returns lag and ages of a live stream; how old the events are in which the model is now trained, among them."""
        if not planned.told:
            return {}
        ages_s = np.concatenate([np.zeros(0), *self._ages_s])
        self._ages_s.clear()
        ages = {}
        if ages_s.size:  # Else all examples since the last row were other processes'.
            half, most = np.quantile(ages_s, [0.5, 0.99])
            ages = {"event_age_p50_s": float(half), "event_age_p99_s": float(most)}
        return {name: round(value, 4) for name, value in {**planned.told, **ages}.items()}

    def _tell_skipped(self, skipped: float) -> None:
        before, self._skipped = self._skipped, max(skipped, self._skipped)
        if skipped > before:
            self._console.print(
                f"step {self._step:,}: SKIPPED {skipped - before:,.0f} messages that were older than TrainConfig.max_lag_s; "
                f"{skipped:,.0f} in all. What was open then was dropped, and is counted in dropped_impressions",
                style="bold red",
            )

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows to metrics.jsonl, and their numbers to TensorBoard."""
        if not rows or not self._writes:
            return
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self._bytes)
            file.seek(self._bytes)
            file.write(data)
        self._bytes += len(data)
        if self._writer:
            for row in rows:
                for name, value in row.items():
                    if isinstance(value, int | float) and name not in ("step", "kind"):
                        where = f"{row['kind']}/{row['head']}/{name}" if "head" in row else f"{row['kind']}/{name}"
                        self._writer.add_scalar(where, value, self._step)

    def _show(self, loss: float) -> None:
        now = time.monotonic()
        if self._live is None and now - self._last_line < _PLAIN_LINE_EVERY_S:
            return
        if now - self._last_totals > _TOTALS_EVERY_S:
            totals = self._measures.totals()
            aucs = [f"{head} {row['auc']:.3f}" for head, row in totals.items() if row.get("auc") is not None]
            self._aucs = "  AUC so far: " + ", ".join(aucs[:4]) if aucs else ""
            self._last_totals = time.monotonic()
        self._last_line = now
        rate = (self._examples - self._examples_at_start) / max(now - self._started, 1e-9)
        left = ""
        if self._total_examples and rate:
            seconds = max(self._total_examples - self._examples, 0) / rate
            left = f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"
        line = f"step {self._step:,}  {self._examples:,} examples  {rate:,.0f}/s  loss {loss:.4f}{self._aucs}{left}"
        if self._live:
            self._live.update(Text(line))
        else:
            self._console.print(line, highlight=False)

    def close_measures(self) -> dict[str, dict[str, Any]]:
        """Writes the rows of the open period; returns the totals of each head."""
        self.write(self._measures.close())
        return self._measures.totals()

    def get_state(self) -> dict[str, Any]:
        """Returns what a snapshot keeps: counts, the file's length, and the measures' arrays."""
        if self._writes and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        state = {"bytes": self._bytes, "step": self._step, "examples": self._examples, "skipped": self._skipped}
        return {**state, "retrieval": self._retrieval.tolist(), "arrays": self._measures.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `get_state` returned: cuts metrics.jsonl to its length."""
        if self._writes:
            _cut(self.path, state["bytes"])
        self._bytes, self._step, self._examples = state["bytes"], state["step"], state["examples"]
        self._skipped = state.get("skipped", 0.0)
        self._retrieval = np.array(state.get("retrieval", np.zeros((2, 4))))
        self._examples_at_start = self._examples
        self._measures.set_state(state["arrays"])


def _of_retrieval(sums: np.ndarray) -> dict[str, float]:
    """Returns what there is to tell of the sums of steps, loss, hits and weight; nothing where there were no steps."""
    steps, loss, hits, weight = sums.tolist()
    if not steps:
        return {}
    return {"retrieval_loss": round(loss / steps, 6)} | ({"retrieval_hit10": round(hits / weight, 6)} if weight else {})


def _cut(path: Path, length: int) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size < length:
        raise ValueError(f"{path} has {size:,} bytes, the snapshot knows {length:,}; the file was cut or removed")
    if size > length:
        os.truncate(path, length)


def _tensorboard_writer(workdir: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError("TrainConfig.tensorboard needs tensorboardX: pip install 'monolith_jax[tensorboard]'") from None
    return SummaryWriter(str(workdir / "tensorboard"))
