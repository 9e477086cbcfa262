"""The features of a candidate that cross it with the request: ids made of columns of both.

In: the raw ids of a request's columns [1, m] and of the candidates' [K, n], which a catalogue keeps, or which are looked up for
each request. Out: ids int64 [K, C], those that `features.featurize` makes of whole examples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from monolith_jax.feature_columns import columns_of
from monolith_jax.features import CrossFeatureConfig, FeatureConfig, IdFeatureConfig, column_ids, crossed
from monolith_jax.types import GroupIds


class Crosses:
    """The crosses over columns of several kinds, or over live ones, in the order of the features."""

    def __init__(
        self, features: Sequence[FeatureConfig], candidate_columns: Collection[str], live_columns: Collection[str] = ()
    ) -> None:
        """Finds them.

        Args:
            features: All of a model.
            candidate_columns: Columns of a candidate that are kept.
            live_columns: Columns of a candidate that are looked up for each request.

        Raises:
            ValueError: Another feature than a cross reads columns of several kinds.
        """
        kinds = dict.fromkeys(candidate_columns, "kept") | dict.fromkeys(live_columns, "live")
        of_features = [(one, {kinds.get(column, "request") for column in columns_of(one)}) for one in features]
        self.features = tuple(
            one for one, of in of_features if isinstance(one, CrossFeatureConfig) and (len(of) > 1 or "live" in of)
        )
        for one, of in of_features:
            if len(of) > 1 and one not in self.features:
                raise ValueError(
                    f"feature {one.name!r} reads {', '.join(columns_of(one))}, some of a candidate and some of the request, or "
                    "some that are kept and some that are looked up; only a CrossFeatureConfig may: name all of them, or none, "
                    "as candidate columns"
                )
        every = list(dict.fromkeys(column for one in self.features for column in one.columns))
        self.candidate_columns = tuple(column for column in every if column in kinds)
        """Those that are looked up are among them."""
        self.request_columns = tuple(column for column in every if column not in kinds)

    def of_request(self, request: pa.RecordBatch) -> GroupIds:
        """Returns the raw ids of the request's columns, [1, m]."""
        return self._raw(request, self.request_columns)

    def of_candidates(self, candidates: pa.RecordBatch) -> GroupIds:
        """Returns the raw ids of the candidates' columns, [K, n]."""
        return self._raw(candidates, self.candidate_columns)

    def of_taken(self, number: int, kept: Mapping[str, tuple[np.ndarray, np.ndarray]], live: pa.RecordBatch | None) -> GroupIds:
        """Returns the raw ids of the columns of so many candidates, [K, n].

        Args:
            number: K.
            kept: What a catalogue has of the columns (`Taken.columns`).
            live: The columns that were looked up.
        """
        ids, valid = (np.zeros((number, len(self.candidate_columns)), dtype) for dtype in (np.int64, np.bool_))
        for index, column in enumerate(self.candidate_columns):
            if column in kept:
                ids[:, index], valid[:, index] = kept[column][0], kept[column][1] > 0
            elif live is not None:
                ids[:, index], valid[:, index] = column_ids(live, column, self._feature_of(column))
        return GroupIds(ids, valid)

    def _feature_of(self, column: str) -> str:
        return next(one.name for one in self.features if column in one.columns)

    def _raw(self, batch: pa.RecordBatch, columns: Sequence[str]) -> GroupIds:
        ids, valid = (np.zeros((batch.num_rows, len(columns)), dtype) for dtype in (np.int64, np.bool_))
        for index, column in enumerate(columns):
            ids[:, index], valid[:, index] = column_ids(batch, column, self._feature_of(column))
        return GroupIds(ids, valid)

    def ids(self, request: GroupIds, candidates: GroupIds) -> np.ndarray:
        """Returns the id of each cross, int64 [K, C].

        Args:
            request: What `of_request` returned.
            candidates: What `of_candidates` returned, or rows of it.
        """
        places = {column: (request, index) for index, column in enumerate(self.request_columns)}
        places |= {column: (candidates, index) for index, column in enumerate(self.candidate_columns)}
        out = np.empty((candidates.ids.shape[0], len(self.features)), np.int64)
        for index, feature in enumerate(self.features):
            of_columns = [places[column] for column in feature.columns]
            out[:, index] = crossed([(side.ids[:, at].copy(), side.valid[:, at]) for side, at in of_columns])
        return out


def table_of(features: Sequence[FeatureConfig], column: str) -> str:
    """Returns the table that a model keeps the ids of a column in; empty: it has no such feature."""
    found = [one.table for one in features if isinstance(one, IdFeatureConfig) and one.column == column]
    return found[0] if found else ""
