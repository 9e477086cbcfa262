"""Test, then train: every example is scored before the model learns from it, and the scores are judged by event time.

In: per batch, in stream order, the scores that the model gave before it trained on the batch, with labels and masks. Out:
one row of metrics per head and period of event time, as the periods close, and totals over the run. (Dawid 1984, "Present
position and potential developments: the prequential approach"; Gama et al. 2013, "On evaluating stream learning
algorithms".)

A batch is only copied when it comes; sorting waits until its period closes. Where a source knows the true probabilities (a
synthetic world), the same metrics of those say what the best possible model would have reached.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from monolith_jax.evaluate import metrics

KINDS = ("binary", "regression")

PERIOD_METRICS = {
    "binary": ("auc", "gauc", "gauc_share", "log_loss", "calibration", "optimal_auc", "optimal_log_loss"),
    "regression": ("mae", "rmse", "calibration", "optimal_mae", "optimal_rmse"),
}
"""The metrics of a period row, by the head's kind; a row holds all, None where one is undefined or of the other kind."""


@dataclass(frozen=True, kw_only=True)
class PrequentialConfig:
    """What the metrics are cut by, and how much memory they may take."""

    period_s: float = 3600.0
    """Length of a period of event time, in seconds; periods begin at multiples of it since 1970."""
    max_examples: int = 2**20
    """Examples of a period held at once, at 8 + 8 T bytes each (8 + 12 T with optimal scores), T heads. A period with more is
    digested in parts: its AUC is then within the stated bound of the exact one, and GAUC groups are (part, user)."""
    max_scores: int = 2**16
    """Distinct scores of a head held for the AUC of the whole run, 24 bytes each, and as many for the optimal scores."""

    def __post_init__(self) -> None:
        """Raises ValueError for values that make no sense."""
        for name, least in (("period_s", 0.001), ("max_examples", 1), ("max_scores", 2)):
            if not getattr(self, name) >= least:
                raise ValueError(f"PrequentialConfig.{name} must be at least {least}, got {getattr(self, name)}")


_SUMS = (
    *("examples", "late", "label", "label_squared", "prediction", "loss", "absolute", "squared", "gauc", "gauc_examples"),
    *("known", "known_label", "known_label_squared", "known_loss", "known_squared"),
    *("optimal_loss", "optimal_absolute", "optimal_squared"),
)
"""What is added up per head. `known...`: over the examples whose optimal score is known."""


class _Part(NamedTuple):
    """Rows of one period, as they came in one batch."""

    groups: np.ndarray
    """int64 [N]."""
    scores: np.ndarray
    """float32 [N, T]."""
    labels: np.ndarray
    """float32 [N, T]: NaN where masked."""
    optimal: np.ndarray | None
    """float32 [N, T]: NaN where unknown."""
    late: int
    """How many belong to an earlier period, which had closed."""


class _Tally:
    """All that is known of one head over some examples. Tallies add up."""

    def __init__(self, max_scores: int) -> None:
        self.sums = dict.fromkeys(_SUMS, 0.0)
        self.scores = metrics.StreamingAuc(max_scores)
        self.optimal = metrics.StreamingAuc(max_scores)

    def merge(self, other: _Tally) -> None:
        for name, value in other.sums.items():
            self.sums[name] += value
        self.scores.merge(other.scores)
        self.optimal.merge(other.optimal)

    def add(
        self, kind: str, scores: np.ndarray, labels: np.ndarray, optimal: np.ndarray | None, codes: np.ndarray, late: int
    ) -> None:
        """Adds the examples of one head: float32 [N] scores, labels and optimal scores, and [N] numbers of the groups."""
        label = labels.astype(np.float64)
        self._sum(
            examples=label.size,
            late=late,
            label=label.sum(),
            label_squared=np.square(label).sum(),
            prediction=scores.sum(dtype=np.float64),
        )
        known = np.zeros(label.shape, bool) if optimal is None else ~np.isnan(optimal)
        best = np.zeros(0, np.float32) if optimal is None else optimal[known]
        truth = label[known]
        self._sum(known=truth.size, known_label=truth.sum(), known_label_squared=np.square(truth).sum())
        if kind == "regression":
            error, best_error = scores - label, best - truth
            self._sum(absolute=np.abs(error).sum(), squared=np.square(error).sum(), known_squared=np.square(error[known]).sum())
            self._sum(optimal_absolute=np.abs(best_error).sum(), optimal_squared=np.square(best_error).sum())
            return
        losses = metrics.log_losses(scores, label)
        self._sum(loss=losses.sum(), known_loss=losses[known].sum(), optimal_loss=metrics.log_losses(best, truth).sum())
        self.scores.add(scores, label)
        self.optimal.add(best, truth)
        weighted, counted = metrics.gauc_sums(scores, label > 0, codes)
        self._sum(gauc=weighted, gauc_examples=counted)

    def _sum(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.sums[name] += float(amount)

    def values(self, kind: str) -> dict[str, float]:
        """Returns every metric of the head; NaN where undefined."""
        s = self.sums
        out = {"calibration": _ratio(s["prediction"], s["label"])}
        if kind == "regression":
            out |= {"mae": _ratio(s["absolute"], s["examples"]), "rmse": math.sqrt(_ratio(s["squared"], s["examples"]))}
            out |= {"optimal_mae": _ratio(s["optimal_absolute"], s["known"])}
            out |= {"optimal_rmse": math.sqrt(_ratio(s["optimal_squared"], s["known"]))}
            out |= {"base_rmse": math.sqrt(_variance(s["label"], s["label_squared"], s["examples"]))}
            base = _variance(s["known_label"], s["known_label_squared"], s["known"])
            reached, best = _ratio(s["known_squared"], s["known"]), _ratio(s["optimal_squared"], s["known"])
        else:
            out |= {"auc": self.scores.value(), "auc_error": self.scores.error_bound(), "optimal_auc": self.optimal.value()}
            out |= {"gauc": _ratio(s["gauc"], s["gauc_examples"]), "gauc_share": _ratio(s["gauc_examples"], s["examples"])}
            out |= {"log_loss": _ratio(s["loss"], s["examples"]), "optimal_log_loss": _ratio(s["optimal_loss"], s["known"])}
            out |= {"base_log_loss": metrics.entropy(_ratio(s["label"], s["examples"]))}
            base = metrics.entropy(_ratio(s["known_label"], s["known"]))
            reached, best = _ratio(s["known_loss"], s["known"]), _ratio(s["optimal_loss"], s["known"])
        return {**out, "learned": _ratio(base - reached, base - best)}

    def get_state(self) -> dict[str, np.ndarray]:
        state = {"sums": np.array([self.sums[name] for name in _SUMS])}
        for name, stream in (("scores", self.scores), ("optimal", self.optimal)):
            state |= {f"{name}_{key}": value for key, value in stream.get_state().items()}
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.sums = dict(zip(_SUMS, np.asarray(state["sums"], np.float64).tolist(), strict=True))
        for name, stream in (("scores", self.scores), ("optimal", self.optimal)):
            keys = ("low", "high", "positives", "negatives", "shift")
            stream.set_state({key: state.get(f"{name}_{key}", np.zeros(0)) for key in keys})


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")


def _variance(total: float, squares: float, examples: float) -> float:
    mean = _ratio(total, examples)
    return max(_ratio(squares, examples) - mean * mean, 0.0) if examples else float("nan")


def _none_for_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class Prequential:
    """Metrics per head and period of event time, of scores that were given before training.

    A period is open until an example of a later one comes; then its rows are returned. Rows of one batch may come in any
    order of time. An example of a period that has closed already is late: it counts in the period that is open, and is
    counted as late there. One event time far in the future therefore closes all periods up to it: sources set such rows aside.
    """

    def __init__(self, config: PrequentialConfig, heads: Sequence[tuple[str, str]]) -> None:
        """Starts with no period open.

        Args:
            config: Periods and memory.
            heads: Name and kind of each head, in the order of the columns; a kind is "binary" or "regression". Without heads
                nothing is measured.

        Raises:
            ValueError: An unknown kind, or a name used twice.
        """
        for name, kind in heads:
            if kind not in KINDS:
                raise ValueError(f"head {name!r}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        names = [name for name, _ in heads]
        if len(set(names)) < len(names):
            raise ValueError(f"heads must have different names, got {', '.join(names)}")
        self._config = config
        self._heads = tuple(heads)
        self._period_ms = max(1, round(config.period_s * 1000))
        self._totals = [_Tally(config.max_scores) for _ in heads]
        self._clear()

    def _clear(self) -> None:
        self._open: int | None = None
        self._parts: list[_Part] = []
        self._held = 0
        # Of an open period that was too large to hold; with as many scores as are held, a period that was not is exact.
        self._digested = self._fresh_tallies()

    def _fresh_tallies(self) -> list[_Tally]:
        return [_Tally(max(self._config.max_scores, self._config.max_examples)) for _ in self._heads]

    def add(
        self,
        event_time_ms: np.ndarray,
        groups: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray,
        optimal: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Takes a batch, scored before the model trained on it.

        Args:
            event_time_ms: int64 [B], Unix time.
            groups: int64 [B], the users, for GAUC.
            scores: float32 [B, T]: probabilities of binary heads, predicted values of regression heads.
            labels: float32 [B, T].
            masks: float32 [B, T]: 0 leaves the example out of the head. A row of zeros is padding and does not count at all.
            optimal: float32 [B, T], the best possible scores, NaN where unknown; None: all unknown.

        Returns:
            The rows of the periods that closed with this batch, one per head and period, oldest first.

        Raises:
            ValueError: The shapes do not fit, or an unmasked score or label is not finite.
        """
        scores, labels, masked = np.asarray(scores, np.float32), np.asarray(labels, np.float32), np.asarray(masks) == 0
        best = None if optimal is None else np.asarray(optimal, np.float32)
        self._check(np.shape(event_time_ms), np.shape(groups), scores, labels, masked, best)
        counts = ~masked.all(axis=1)
        period = np.asarray(event_time_ms, np.int64) // self._period_ms
        labels = np.where(masked, np.float32(np.nan), labels)
        groups = np.asarray(groups, np.int64)
        rows: list[dict[str, Any]] = []
        for now in np.unique(period[counts]).tolist():
            if self._open is None:
                self._open = now
            if now > self._open:
                rows += self.close()
                self._open = now
            here = counts & (period == now)
            late = int(here.sum()) if now < self._open else 0
            part = _Part(groups[here], scores[here], labels[here], None if best is None else best[here], late)
            self._parts.append(part)
            self._held += part.groups.size
            if self._held >= self._config.max_examples:
                self._digest(self._digested)
                self._parts, self._held = [], 0
        return rows

    def _check(
        self,
        times: tuple[int, ...],
        groups: tuple[int, ...],
        scores: np.ndarray,
        labels: np.ndarray,
        masked: np.ndarray,
        optimal: np.ndarray | None,
    ) -> None:
        wanted = (*times, len(self._heads))
        matrices = {"scores": scores.shape, "labels": labels.shape, "masks": masked.shape}
        matrices |= {} if optimal is None else {"optimal": optimal.shape}
        if len(times) != 1 or groups != times or any(shape != wanted for shape in matrices.values()):
            got = ", ".join(f"{name} {shape}" for name, shape in {"event_time_ms": times, "groups": groups, **matrices}.items())
            raise ValueError(
                f"expected event_time_ms and groups [B], the others [B, {len(self._heads)}] (one column a head), got {got}"
            )
        for name, values in (("score", scores), ("label", labels)):
            bad = ~np.isfinite(values) & ~masked
            if bad.any():
                worst = [f"{head} ({count})" for (head, _), count in zip(self._heads, bad.sum(axis=0), strict=True) if count]
                raise ValueError(f"a {name} that is not finite, for {', '.join(worst)}: the model diverged, or mask them")

    def _digest(self, tallies: list[_Tally]) -> None:
        """Adds what is held of the open period to tallies."""
        if not self._parts:
            return
        part = _stack(self._parts)
        codes = np.unique(part.groups, return_inverse=True)[1]

        def digest(head: int) -> None:
            label = part.labels[:, head]
            there = ~np.isnan(label)
            best = None if part.optimal is None else part.optimal[there, head]
            tallies[head].add(self._heads[head][1], part.scores[there, head], label[there], best, codes[there], part.late)

        # The heads share nothing, and numpy sorts without Python's lock; so training waits for the slowest head only.
        with ThreadPoolExecutor(len(self._heads)) as pool:
            list(pool.map(digest, range(len(self._heads))))

    def _period(self) -> list[_Tally]:
        """Returns the tallies of the open period, which stays as it is."""
        tallies = self._fresh_tallies()
        for tally, digested in zip(tallies, self._digested, strict=True):
            tally.merge(digested)
        self._digest(tallies)
        return tallies

    def close(self) -> list[dict[str, Any]]:
        """Closes the open period and returns its rows, one per head; none when no period is open."""
        if self._open is None:
            return []
        start = self._open * self._period_ms
        tallies = self._period()
        rows = [self._row(start, name, kind, tally) for (name, kind), tally in zip(self._heads, tallies, strict=True)]
        for total, tally in zip(self._totals, tallies, strict=True):
            total.merge(tally)
        self._clear()
        return rows

    def _row(self, start: int, name: str, kind: str, tally: _Tally) -> dict[str, Any]:
        row: dict[str, Any] = {"kind": "period", "period_start_ms": start, "head": name}
        row |= {"examples": int(tally.sums["examples"]), "late": int(tally.sums["late"])}
        row |= {"positives": int(tally.sums["label"]) if kind == "binary" else None}
        row |= {metric: None for each in KINDS for metric in PERIOD_METRICS[each]}
        values = tally.values(kind)
        return row | _none_for_nan({metric: values[metric] for metric in PERIOD_METRICS[kind]})

    def totals(self) -> dict[str, dict[str, Any]]:
        """Returns the metrics of each head over the whole run, the open period included, None where undefined.

        Binary heads: `auc` and the largest possible error of it, `auc_error`; `gauc` over (period, user) groups and
        `gauc_share`; `log_loss`, `base_log_loss` (that of always predicting the mean label), `calibration`; `optimal_auc` and
        `optimal_log_loss`, over the examples whose optimal score is known; `learned` = (base - reached) / (base - optimal)
        log-loss over the same examples: 0 knows only the mean, 1 is the best possible. Regression heads: `mae`, `rmse`,
        `base_rmse`, `calibration`, `optimal_mae`, `optimal_rmse`, and `learned` of the squared error. Each is a row of kind
        "total" with its `head`.
        """
        rows = {}
        for (name, kind), total, tally in zip(self._heads, self._totals, self._period(), strict=True):
            whole = _Tally(self._config.max_scores)
            whole.merge(total)
            whole.merge(tally)
            counts = {"examples": int(whole.sums["examples"]), "late": int(whole.sums["late"])}
            positives = {"positives": int(whole.sums["label"])} if kind == "binary" else {}
            rows[name] = {"kind": "total", "head": name, **counts, **positives, **_none_for_nan(whole.values(kind))}
        return rows

    def _made_for(self) -> np.ndarray:
        return np.frombuffer(json.dumps([self._period_ms, *self._heads]).encode(), np.uint8).copy()

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns all state, as arrays of its own; the ones that would be empty are left out (Orbax refuses those)."""
        state = {"made_for": self._made_for(), "open": np.array([] if self._open is None else [self._open], np.int64)}
        if self._parts:
            part = _stack(self._parts)
            state |= {"groups": part.groups, "scores": part.scores, "labels": part.labels, "late": np.array([part.late])}
            state |= {} if part.optimal is None else {"optimal": part.optimal}
        for kind, tallies in (("total", self._totals), ("digested", self._digested)):
            for head, tally in enumerate(tallies):
                state |= {f"{kind}_{head}_{name}": value for name, value in tally.get_state().items()}
        return {name: array for name, array in state.items() if array.size}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned: what follows gives the same rows as without the interruption.

        Raises:
            ValueError: The state is of other heads or another period.
        """
        if bytes(np.asarray(state["made_for"], np.uint8)) != bytes(self._made_for()):
            was = bytes(np.asarray(state["made_for"], np.uint8)).decode()
            raise ValueError(
                f"metrics of [period_ms, heads...] = {was} cannot go on as {bytes(self._made_for()).decode()}: "
                "resume with the same heads and period, or start the metrics afresh"
            )
        self._clear()
        self._open = int(state["open"][0]) if "open" in state else None
        if "groups" in state:
            best = np.array(state["optimal"], np.float32) if "optimal" in state else None
            scores, labels = np.array(state["scores"], np.float32), np.array(state["labels"], np.float32)
            self._parts = [_Part(np.array(state["groups"], np.int64), scores, labels, best, int(state["late"][0]))]
            self._held = self._parts[0].groups.size
        for kind, tallies in (("total", self._totals), ("digested", self._digested)):
            for head, tally in enumerate(tallies):
                prefix = f"{kind}_{head}_"
                tally.set_state({name[len(prefix) :]: array for name, array in state.items() if name.startswith(prefix)})


def _stack(parts: Sequence[_Part]) -> _Part:
    """Returns the rows of several parts as one."""
    optimal = None
    if any(part.optimal is not None for part in parts):
        optimal = np.concatenate(
            [np.full_like(part.scores, np.nan) if part.optimal is None else part.optimal for part in parts]
        )
    groups, scores, labels = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("groups", "scores", "labels")
    )
    return _Part(groups, scores, labels, optimal, sum(part.late for part in parts))
