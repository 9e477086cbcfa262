"""Held-out examples with their scores to rows: how good each head is, of all examples and of segments of them.

In: `Scored`, what a model gave to examples that it had not learned from, and `Segment`s of these. Out: rows of metrics with
intervals by bootstrap over users, one a segment's value and head; and the reliability curve of each head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.evaluate import bootstrap, metrics

ALL = "all"
"""The segment of all examples."""
NONE, OTHER = "none", "other"
"""Values of a segment: of examples without one, and of those whose value is not among the most frequent.
Examples that really have such a value are under it in quotes."""
_MOST_HOURS = 1000
_FEW = 32
"""Whole numbers with at most so many different values are names, not amounts."""


class Scored(NamedTuple):
    """Examples that were scored."""

    event_time_ms: np.ndarray
    """int64 [N]"""
    users: np.ndarray
    """int64 [N]"""
    scores: np.ndarray
    """float32 [N, T]: probabilities of binary heads, predicted values of regression heads."""
    labels: np.ndarray
    """float32 [N, T]"""
    masks: np.ndarray
    """float32 [N, T], 0 where the label is undefined: the example is left out of the head."""


class Segment(NamedTuple):
    """Examples told apart by something."""

    name: str
    values: tuple[str, ...]
    """What it may be."""
    codes: np.ndarray
    """int [N], which of the values each example has."""


def segment(name: str, column: pa.Array | pa.ChunkedArray, most: int = 6, quantiles: int = 4) -> Segment:
    """Returns the segment of a column: of names by the most frequent ones, of amounts by their quantiles.

    Names are strings, booleans, whole numbers of a column `..._id`, and other whole numbers with few different values. Of a
    list the first item counts.

    Args:
        name: Of the column.
        column: [N], strings, numbers, booleans, or lists of these.
        most: Names that stand alone; all others are `OTHER`.
        quantiles: Parts of equal size that amounts are cut into, fewer where values are tied.

    Raises:
        ValueError: The column is of another type.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = _first_items(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind, there = column.type, ~np.asarray(column.is_null())
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or _is_text(kind)):
        raise ValueError(f"column {name!r} is of type {kind}; a segment takes strings, numbers, booleans, or lists of these")
    present = column.filter(pa.array(there))
    known = np.asarray(present.to_numpy(zero_copy_only=False))
    if pa.types.is_floating(kind):
        finite = np.isfinite(known)
        there[np.flatnonzero(there)[~finite]], known = False, known[finite]
    is_amount = pa.types.is_floating(kind) or (
        pa.types.is_integer(kind) and not name.endswith("_id") and np.unique(known).size > _FEW
    )
    values, codes = _by_quantile(known, quantiles) if is_amount else _by_value(known, most)
    return _with_none(name, values, codes, there)


def flags(name: str, column: np.ndarray, values: tuple[str, str]) -> Segment:
    """Returns the segment of a yes or no, bool [N]; `values` are the names of False and True."""
    return Segment(name, values, np.asarray(column, np.int64))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _first_items(lists: Any) -> pa.Array:
    flat, offsets = lists.values, np.asarray(lists.offsets)
    filled = (offsets[1:] > offsets[:-1]) & ~np.asarray(lists.is_null())
    return flat.take(pa.array(offsets[:-1], mask=~filled))


def _by_value(known: np.ndarray, most: int) -> tuple[list[str], np.ndarray]:
    if not known.size:
        return [], np.zeros(0, np.int64)
    found, codes, number = np.unique(known, return_inverse=True, return_counts=True)
    kept = np.argsort(-number, kind="stable")[:most]
    place = np.full(found.size, kept.size)
    place[kept] = np.arange(kept.size)
    names = [repr(name) if name in (NONE, OTHER) else name for name in (str(found[at]) for at in kept)]
    return [*names, OTHER] if found.size > kept.size else names, place[codes]


def _by_quantile(known: np.ndarray, quantiles: int) -> tuple[list[str], np.ndarray]:
    if not known.size:
        return [], np.zeros(0, np.int64)
    inner = np.unique(np.quantile(known, np.arange(1, quantiles) / quantiles, method="higher"))
    inner = inner[inner > known.min()]
    edges = _told_apart(inner.tolist())
    if not edges:
        return [f"{known.min():.4g}"], np.zeros(known.size, np.int64)
    names = [f"< {edges[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(edges)), f">= {edges[-1]}"]
    return names, np.searchsorted(inner, known, side="right")


def _told_apart(edges: Sequence[float]) -> list[str]:
    """Returns numbers as texts, with as few digits from 4 as tell them apart; whole numbers with 4 or with all."""
    whole = all(isinstance(edge, int) for edge in edges)
    for digits in (4,) if whole else range(4, 18):
        texts = [f"{edge:.{digits}g}" for edge in edges]
        if len(set(texts)) == len(texts):
            return texts
    return [str(edge) for edge in edges]


def hours(event_time_ms: np.ndarray) -> Segment:
    """Returns the segment "hour": the hours of event time that have examples, in UTC, in their order.

    Args:
        event_time_ms: int64 [N].

    Raises:
        ValueError: There are more hours than a table can show.
    """
    found, codes = np.unique(np.asarray(event_time_ms, np.int64) // 3_600_000, return_inverse=True)
    if found.size > _MOST_HOURS:
        raise ValueError(
            f"segment hour: the examples are of {found.size:,} hours, and a table takes {_MOST_HOURS:,}: "
            "hold out a shorter time"
        )
    return Segment("hour", tuple(str(hour) for hour in found.astype("datetime64[h]")), codes)


def _with_none(name: str, values: Sequence[str], codes: np.ndarray, there: np.ndarray) -> Segment:
    out = np.full(there.size, len(values), np.int64)
    out[there] = codes
    return Segment(name, tuple(values) if there.all() else (*values, NONE), out)


def table(
    scored: Scored,
    heads: Sequence[tuple[str, str]],
    segments: Sequence[Segment] = (),
    number: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Returns the metrics of all examples and of each segment's values, a row a head; undefined ones are None.

    A row is of kind "ranking" and has `segment` and `value`, `head`, `examples`, `users`, of a binary head `positives`, and the
    metrics of `bootstrap.METRICS`, of each also `<metric>_low` and `<metric>_high`.

    Args:
        scored: The examples.
        heads: Name and kind of each head, in the order of the columns.
        segments: Further rows.
        number: Resamples; 0: no intervals.
        confidence: Share of the resamples that an interval holds.
        seed: Of the draws.

    Raises:
        ValueError: The shapes do not fit, or an unmasked score or label is not finite.
    """
    _check(scored, heads)
    everything = Segment(ALL, ("",), np.zeros(scored.users.size, np.int64))
    rows = []
    for one in (everything, *segments):
        if one.codes.shape != scored.users.shape:
            raise ValueError(f"segment {one.name!r} has codes {one.codes.shape}, and there are {scored.users.size} examples")
        for code, value in enumerate(one.values):
            where = one.codes == code
            for head, (name, kind) in enumerate(heads):
                there = where & (scored.masks[:, head] != 0)
                key = {"kind": "ranking", "segment": one.name, "value": value, "head": name}
                rows.append(key | _measured(scored, head, kind, there, (number, confidence, seed)))
    return rows


def _measured(
    scored: Scored, head: int, kind: str, there: np.ndarray, how: tuple[int, float, int]
) -> dict[str, float | int | None]:
    scores, labels, users = scored.scores[there, head], scored.labels[there, head], scored.users[there]
    row: dict[str, float | int | None] = {"examples": scores.size, "users": np.unique(users).size}
    if kind == "binary":
        row["positives"] = int((labels > 0).sum())
    for name, interval in bootstrap.of_head(scores, labels, users, kind, *how).items():
        for suffix, value in zip(("", "_low", "_high"), interval, strict=True):
            row[name + suffix] = value if math.isfinite(value) else None
    return row


def reliability(scored: Scored, heads: Sequence[tuple[str, str]], bins: int = 20) -> list[dict[str, Any]]:
    """Returns the reliability curve of each head: rows of kind "calibration".

    A row has `head`, `bin`, `prediction` and `label` (means), `examples`. Examples are cut by their predictions into bins of
    equal numbers; where the mean label is the mean prediction, the head is right there.

    Raises:
        ValueError: The shapes do not fit, or an unmasked score or label is not finite.
    """
    _check(scored, heads)
    rows = []
    for head, (name, _) in enumerate(heads):
        there = scored.masks[:, head] != 0
        curve = metrics.calibration_bins(scored.scores[there, head], scored.labels[there, head], bins)
        for at, (prediction, label, examples) in enumerate(zip(*vars(curve).values(), strict=True)):
            of_bin = {"prediction": float(prediction), "label": float(label), "examples": int(examples)}
            rows.append({"kind": "calibration", "head": name, "bin": at, **of_bin})
    return rows


def _check(scored: Scored, heads: Sequence[tuple[str, str]]) -> None:
    wanted = (scored.users.size, len(heads))
    shapes = {name: getattr(scored, name).shape for name in ("scores", "labels", "masks")}
    if any(shape != wanted for shape in shapes.values()) or scored.event_time_ms.shape != scored.users.shape:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected scores, labels and masks {list(wanted)}, a row an example and a column a head; got {got}")
    for name, values in (("score", scored.scores), ("label", scored.labels)):
        if bad := int((~np.isfinite(values) & (scored.masks != 0)).sum()):
            raise ValueError(f"{bad} times a {name} is not finite: mask these, or look why the model diverged")
