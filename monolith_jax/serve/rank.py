"""One user and K candidates to scores: the ranker, with the user's side computed once.

In: features of the request (one row) and of the candidates (K rows). Out: scores float32 [K, T], but for rounding those that
`ServedModel.predict` gives for whole examples. A feature is a candidate's if it reads one of its columns, else the request's.
What does not depend on the request can be kept ready for each video (`plain_layout`, `crosses.of_candidates`), so that a
request touches no Arrow but its own row.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from monolith_jax.features import FeatureLayout, Features, featurize, restricted
from monolith_jax.models.candidates import Prepared, SideInputs, Split, candidate_logits, prepare, split
from monolith_jax.models.losses import scores
from monolith_jax.serve.crosses import Crosses, columns_of
from monolith_jax.serve.padding import checked_sizes, no_features, padded, part_sizes
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.types import GroupIds

_prepare = jax.jit(prepare, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _predict(split: Split, prepared: Prepared, once: SideInputs, each: SideInputs) -> jax.Array:
    return scores(candidate_logits(split, prepared, once, each), split.towers.heads)


class Ranker:
    """The compiled ranker of a served model, for one user at a time. Any number of threads may call it."""

    def __init__(self, model: ServedModel, candidate_columns: Collection[str], sizes: Sequence[int] = (256, 1024)) -> None:
        """Compiles the ranker for each size.

        Args:
            model: The served model, with a ranker.
            candidate_columns: Columns whose values are the candidate's own; all others are the request's.
            sizes: Numbers of candidates that requests are padded to; larger ones are cut into parts.

        Raises:
            ValueError: No feature reads a column of candidates, another feature than a cross reads columns of both kinds, the
                model has no ranker, or the sizes are none.
        """
        self._model, self._sizes = model, checked_sizes(sizes, "sizes")
        features = model.layout.features
        self.crosses = Crosses(features, candidate_columns)
        each = [one.name for one in features if set(columns_of(one)) & set(candidate_columns)]
        if not each:
            read = sorted({column for one in features for column in columns_of(one)})
            raise ValueError(
                f"no feature reads a column of candidates, so all would score the same; candidate_columns: "
                f"{', '.join(sorted(candidate_columns)) or 'none'}; columns of features: {', '.join(read)}"
            )
        crossing = [one.name for one in self.crosses.features]
        self._split = split(model.towers, model.dims, each)
        self.once_layout, self.each_layout = self._split.once, self._split.each
        self.plain_layout = restricted(model.layout, [name for name in each if name not in crossing])
        self.heads = model.towers.heads
        self._tables = [model.position_tables(layout) for layout in (self.once_layout, self.each_layout)]
        self._plain_places = [_places(self.each_layout, group, crossing, False) for group in range(len(model.dims))]
        self._cross_places = [_places(self.each_layout, group, crossing, True) for group in range(len(model.dims))]
        self._prepared: tuple[Any, Prepared | None] = (None, None)
        for size in self._sizes:
            self.scores(no_features(self.once_layout, 1), no_features(self.each_layout, size))

    def once_features(self, request: pa.RecordBatch) -> Features:
        """Returns the features of a request of one row that all candidates share.

        Raises:
            ValueError: There is another number of rows, or a column is missing or of a wrong type.
        """
        if request.num_rows != 1:
            raise ValueError(
                f"a request is a batch of one row, got {request.num_rows}; rank the candidates of one user at a time"
            )
        return featurize(request, self.once_layout)

    def candidate_features(self, request: pa.RecordBatch, candidates: pa.RecordBatch) -> Features:
        """Returns the features that candidates have for themselves, of `each_layout`.

        Args:
            request: One row, with the columns of the request that crosses read.
            candidates: K rows, with the columns of candidates.

        Raises:
            ValueError: A column is missing or of a type that its feature cannot read.
        """
        plain = featurize(candidates, self.plain_layout)
        return self.joined(plain, self.crosses.ids(self.crosses.of_request(request), self.crosses.of_candidates(candidates)))

    def joined(self, plain: Features, cross_ids: np.ndarray) -> Features:
        """Returns the features of candidates, of `each_layout`.

        Args:
            plain: Those that do not depend on the request, of `plain_layout`.
            cross_ids: The others, int64 [K, C], as `crosses.ids` returned them.
        """
        if not self.crosses.features:
            return plain
        groups, weights, number = [], [], cross_ids.shape[0]
        for group, (ids, valid) in enumerate(plain.groups):
            into, (to, of) = self._plain_places[group][0], self._cross_places[group]
            shape = (number, self.each_layout.num_positions(group))
            all_ids, all_valid = np.empty(shape, np.int64), np.ones(shape, np.bool_)
            all_ids[:, into], all_valid[:, into] = ids, valid
            all_ids[:, to] = cross_ids[:, of]
            groups.append(GroupIds(all_ids, all_valid))
            beside = plain.weights[group]
            if beside is not None:
                beside, of_plain = np.ones(shape, np.float32), beside
                beside[:, into] = of_plain
            weights.append(beside)
        return Features(tuple(groups), tuple(weights), plain.dense)

    def scores(self, once: Features, each: Features) -> np.ndarray:
        """Returns the scores of candidates, float32 [K, T], in the order of `heads`; all of one version.

        Args:
            once: Of one row, of `once_layout`.
            each: Of K rows, of `each_layout`.
        """
        number = each.dense.shape[0]
        if not number:
            return np.zeros((0, len(self.heads)), np.float32)
        sizes = part_sizes(number, self._sizes)
        whole = padded(each, sum(sizes))
        (of_once, of_each), weights = self._model.gather([(once.groups, self._tables[0]), (whole.groups, self._tables[1])])
        prepared = self._prepared_of(weights)
        inputs = _side(of_once, once)
        candidates = _side(of_each, whole)
        if len(sizes) == 1:
            return np.asarray(_predict(self._split, prepared, inputs, candidates))[:number]
        scored, start = [], 0
        for size in sizes:
            where = slice(start, start + size)
            part = jax.tree.map(lambda array, where=where: array[where], candidates)
            scored.append(_predict(self._split, prepared, inputs, part))
            start += size
        return np.concatenate([np.asarray(one) for one in scored])[:number]

    def _prepared_of(self, weights: Any) -> Prepared:
        """Returns the weights as the ranker takes them, made once for each version of them."""
        of, prepared = self._prepared
        if prepared is None or of is not weights:
            prepared = _prepare(self._split, weights)
            self._prepared = (weights, prepared)
        return prepared


def _places(layout: FeatureLayout, group: int, crossing: Sequence[str], of_crosses: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of a group that crosses take, or the others, and of crosses which of them each is."""
    slots = [slot for slot in layout.groups[group] if (slot.feature in crossing) == of_crosses]
    positions = [position for slot in slots for position in range(slot.start, slot.start + slot.length)]
    which = [crossing.index(slot.feature) for slot in slots] if of_crosses else []
    return np.array(positions, np.int64), np.array(which, np.int64)


def _side(vectors: Sequence[np.ndarray], features: Features) -> SideInputs:
    return SideInputs(tuple(vectors), tuple(group.valid for group in features.groups), features.weights, features.dense)
