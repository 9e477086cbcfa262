"""One user and K candidates to scores: the ranker, with the user's side computed once.

In: features of the request (one row) and of the candidates (K rows). Out: scores float32 [K, T], but for rounding those that
`ServedModel.predict` gives for whole examples. A feature is a candidate's if it reads one of its columns, else the request's.
What does not depend on the request can be kept ready for each video (`plain_layout`, `crosses.of_candidates`), so that a
request touches no Arrow but its own row, and the columns of candidates that change all the time (`live_layout`).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa

from monolith_jax.feature_columns import columns_of
from monolith_jax.features import DenseFeatureConfig, FeatureLayout, Features, featurize, restricted
from monolith_jax.models.candidates import Prepared, SideInputs, Split, candidate_logits, prepare, split
from monolith_jax.models.losses import scores
from monolith_jax.serve.crosses import Crosses
from monolith_jax.serve.padding import checked_sizes, no_features, padded, part_sizes
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.types import GroupIds

_prepare = jax.jit(prepare, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _predict(split: Split, prepared: Prepared, once: SideInputs, each: SideInputs) -> jax.Array:
    return scores(candidate_logits(split, prepared, once, each), split.towers.heads)


class Ranker:
    """The compiled ranker of a served model, for one user at a time. Any number of threads may call it."""

    def __init__(
        self,
        model: ServedModel,
        candidate_columns: Collection[str],
        sizes: Sequence[int] = (256, 1024),
        live_columns: Collection[str] = (),
    ) -> None:
        """Compiles the ranker for each size.

        Args:
            model: The served model, with a ranker.
            candidate_columns: Columns whose values are the candidate's own; all others are the request's.
            sizes: Numbers of candidates that requests are padded to; larger ones are cut into parts.
            live_columns: Further ones, that are looked up for each request, as they change all the time.

        Raises:
            ValueError: No feature reads a column of candidates, another feature than a cross reads columns of several kinds,
                the model has no ranker, or the sizes are none.
        """
        self._model, self._sizes = model, checked_sizes(sizes, "sizes")
        features = model.layout.features
        self.crosses = Crosses(features, candidate_columns, live_columns)
        each = [one.name for one in features if set(columns_of(one)) & {*candidate_columns, *live_columns}]
        if not each:
            read = sorted({column for one in features for column in columns_of(one)})
            raise ValueError(
                f"no feature reads a column of candidates, so all would score the same; candidate_columns: "
                f"{', '.join(sorted(candidate_columns)) or 'none'}; columns of features: {', '.join(read)}"
            )
        crossing = [one.name for one in self.crosses.features]
        self._split = split(model.towers, model.dims, each)
        self.once_layout, self.each_layout = self._split.once, self._split.each
        live = [one.name for one in features if set(columns_of(one)) & set(live_columns) and one.name not in crossing]
        plain = [name for name in each if name not in crossing and name not in live]
        self.plain_layout, self.live_layout = restricted(model.layout, plain), restricted(model.layout, live)
        self.heads = model.towers.heads
        self._tables = [model.position_tables(layout) for layout in (self.once_layout, self.each_layout)]
        self._plain_places, self._live_places = _places(self.each_layout, plain), _places(self.each_layout, live)
        self._cross_places = _places(self.each_layout, crossing)
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
        plain, live = featurize(candidates, self.plain_layout), featurize(candidates, self.live_layout)
        cross_ids = self.crosses.ids(self.crosses.of_request(request), self.crosses.of_candidates(candidates))
        return self.joined(plain, cross_ids, live)

    def joined(self, plain: Features, cross_ids: np.ndarray, live: Features | None = None) -> Features:
        """Returns the features of candidates, of `each_layout`.

        Args:
            plain: Those that do not depend on the request, of `plain_layout`.
            cross_ids: Those that cross, int64 [K, C], as `crosses.ids` returned them.
            live: Those of columns that were looked up, of `live_layout`; None: there is no such feature.
        """
        if not self.crosses.features and not self.live_layout.features:
            return plain
        parts = [(plain, self._plain_places)] + ([] if live is None else [(live, self._live_places)])
        groups, weights, number = [], [], cross_ids.shape[0]
        for group, slots in enumerate(self.each_layout.groups):
            shape = (number, self.each_layout.num_positions(group))
            ids, valid = np.empty(shape, np.int64), np.ones(shape, np.bool_)
            beside = np.ones(shape, np.float32) if any(slot.weighted for slot in slots) else None
            for part, places in parts:
                into, of_part = places.positions[group], part.weights[group]
                ids[:, into], valid[:, into] = part.groups[group]
                if beside is not None and of_part is not None:
                    beside[:, into] = of_part
            ids[:, self._cross_places.positions[group]] = cross_ids[:, self._cross_places.features[group]]
            groups.append(GroupIds(ids, valid))
            weights.append(beside)
        dense = np.zeros((number, self.each_layout.num_dense), np.float32)
        for part, places in parts:
            dense[:, places.dense] = part.dense
        return Features(tuple(groups), tuple(weights), dense)

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


class _Places(NamedTuple):
    """Where some features stand in a layout, by group."""

    positions: list[np.ndarray]
    """int64 [P], of ids."""
    features: list[np.ndarray]
    """int64 [P], which of the features each is of."""
    dense: np.ndarray
    """int64 [n]"""


def _places(layout: FeatureLayout, names: Sequence[str]) -> _Places:
    positions, which = [], []
    for slots in layout.groups:
        mine = [slot for slot in slots if slot.feature in names]
        positions.append(np.array([at for slot in mine for at in range(slot.start, slot.start + slot.length)], np.int64))
        which.append(np.array([names.index(slot.feature) for slot in mine for _ in range(slot.length)], np.int64))
    of_dense = [one for one in layout.features if isinstance(one, DenseFeatureConfig)]
    owners = [one.name for one in of_dense for _ in range(one.size)]
    return _Places(positions, which, np.array([at for at, name in enumerate(owners) if name in names], np.int64))


def _side(vectors: Sequence[np.ndarray], features: Features) -> SideInputs:
    return SideInputs(tuple(vectors), tuple(group.valid for group in features.groups), features.weights, features.dense)
