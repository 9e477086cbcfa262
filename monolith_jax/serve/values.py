"""Scores of heads to the one value that candidates are ranked by.

In: scores float32 [K, T], as `serve.rank` gives them, and durations. Out: value = sum over heads of weight times calibrated
score, plus the weight of a second times the seconds that are expected to be played; weights may be negative (skip, dislike),
and of their own for groups of users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monolith_jax.models.losses import HeadConfig

_PLAYED = "play_ratio"
"""The head whose score times the duration is the expected time of play."""
_SMALLEST = 1e-7
"""Probabilities are this far from 0 and 1 when they are turned to logits: about the last digit of a float32."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the scores of a head are corrected; `evaluate.calibration` finds the numbers."""

    head: str
    """Label of the head."""
    slope: float = 1.0
    """Binary: sigmoid(slope * logit(score) + intercept). Regression: slope * score + intercept."""
    intercept: float = 0.0
    """As above."""


@dataclass(frozen=True, kw_only=True)
class GroupValuesConfig:
    """What is of another value for a group of users."""

    name: str
    """Name of the group, by which a request gives it."""
    heads: tuple[str, ...] = ()
    """Labels of heads whose weight differs from that of `RankConfig`."""
    weights: tuple[float, ...] = ()
    """Weight of each of them."""
    play_s_weight: float | None = None
    """Value of one expected second of play; None: that of `RankConfig`."""


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """How many candidates are scored, and what a score is worth."""

    num_candidates: int = 1000
    """K, candidates that recall gives to the ranker."""
    heads: tuple[str, ...]
    """Labels of the heads that count."""
    weights: tuple[float, ...]
    """Weight of each of them: the value of the action; negative for what users dislike."""
    play_s_weight: float = 0.0
    """Value of one expected second of play: the score of the head play_ratio times the duration."""
    interest_weight: float = 0.0
    """Value of having a tag in common with the videos that the user liked last, times the share of these that have it: what
    makes a feed turn with the last swipe, before the model has learned from it."""
    groups: tuple[GroupValuesConfig, ...] = ()
    """Groups of users for whom other weights hold."""
    calibration: tuple[CalibrationConfig, ...] = ()
    """Corrections of scores; heads that are not named are taken as they are."""


class Values:
    """The value of candidates, by a config."""

    def __init__(self, config: RankConfig, heads: Sequence[HeadConfig]) -> None:
        """Starts with nothing counted.

        Args:
            config: What a score is worth.
            heads: Of the ranker, in the order of the scores.

        Raises:
            ValueError: A head is unknown or named twice, or the config does not fit together.
        """
        if config.num_candidates < 1:
            raise ValueError(f"RankConfig.num_candidates must be at least 1, got {config.num_candidates}")
        self._labels = [head.label for head in heads]
        weights = self._weights(np.zeros(len(heads)), config.heads, config.weights, "RankConfig")
        self._default, self._interest_weight = (weights, config.play_s_weight), config.interest_weight
        self._groups: dict[str, tuple[np.ndarray, float]] = {}
        for group in config.groups:
            where = f"GroupValuesConfig {group.name!r}"
            if group.name in self._groups:
                raise ValueError(f"{where} is there twice; groups need names of their own")
            play_s = config.play_s_weight if group.play_s_weight is None else group.play_s_weight
            self._groups[group.name] = (self._weights(weights, group.heads, group.weights, where), play_s)
        plays = any(play_s for _, play_s in (self._default, *self._groups.values()))
        self._played = self._index(_PLAYED, "play_s_weight") if plays else None
        self._binary = [head.kind == "binary" for head in heads]
        self._calibration = [(self._index(one.head, "CalibrationConfig"), one) for one in config.calibration]
        if len({index for index, _ in self._calibration}) < len(self._calibration):
            raise ValueError("RankConfig.calibration names a head twice; one CalibrationConfig a head")
        self._unknown_groups = self._set_aside = 0

    def _index(self, label: str, where: str) -> int:
        if label not in self._labels:
            raise ValueError(
                f"{where} needs the head {label!r}, which the ranker has not; its heads: {', '.join(self._labels)}"
            )
        return self._labels.index(label)

    def _weights(self, over: np.ndarray, heads: Sequence[str], weights: Sequence[float], where: str) -> np.ndarray:
        if len(heads) != len(weights) or len(set(heads)) < len(heads) or not np.isfinite(weights).all():
            raise ValueError(f"{where}: heads must differ, with a finite number in weights for each, got {heads} and {weights}")
        out = over.astype(np.float64)
        out[[self._index(label, f"{where}.heads") for label in heads]] = weights
        return out

    def metrics(self) -> dict[str, int]:
        """Returns how many requests named an unknown group, and how many candidates had a score that is no number."""
        return {"unknown_groups": self._unknown_groups, "set_aside": self._set_aside}

    def calibrated(self, scores: np.ndarray) -> np.ndarray:
        """Returns corrected scores, float64 [K, T], of scores [K, T]."""
        out = scores.astype(np.float64)
        for index, one in self._calibration:
            if self._binary[index]:
                inside = np.clip(out[:, index], _SMALLEST, 1 - _SMALLEST)
                logits = one.slope * (np.log(inside) - np.log1p(-inside)) + one.intercept
                out[:, index] = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
            else:
                out[:, index] = one.slope * out[:, index] + one.intercept
        return out

    def __call__(
        self, scores: np.ndarray, durations_ms: np.ndarray, group: str = "", interest: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Returns the value of each candidate, float32 [K].

        A candidate with a score that is no finite number has the value -inf, and is counted.

        Args:
            scores: float32 [K, T].
            durations_ms: [K] in milliseconds; a play of what is NaN or below 0 is expected to last 0 s.
            interest: [K], share of the videos that the user liked last with which each has a tag in common.
            group: Of the user; of a name that no config has, and is not empty, the defaults hold, and it is counted.
        """
        if group and group not in self._groups:
            self._unknown_groups += 1
        weights, play_s = self._groups.get(group, self._default)
        good = np.asarray(np.isfinite(scores).all(axis=1))
        if not good.all():
            self._set_aside += int(good.size - good.sum())
            scores = np.where(good[:, None], scores, 0.5)
        of_heads = self.calibrated(scores)
        values = of_heads @ weights + self._interest_weight * interest
        if self._played is not None and play_s:
            durations = np.asarray(durations_ms, np.float64)
            values += play_s * of_heads[:, self._played] * np.where(durations > 0, durations, 0.0) / 1000
        return np.where(good, values, -np.inf).astype(np.float32)
