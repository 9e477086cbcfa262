"""Which columns features read, and which of them a log may have left out.

In: declarations of features, examples. Out: names of columns; examples that have them.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from monolith_jax.features import (
    BucketFeatureConfig,
    CrossFeatureConfig,
    DenseFeatureConfig,
    FeatureConfig,
    IdFeatureConfig,
    TimeFeatureConfig,
)
from monolith_jax.lake.rows import column_types


def columns_of(feature: FeatureConfig) -> tuple[str, ...]:
    """Returns the columns that a feature reads."""
    match feature:
        case IdFeatureConfig():
            return (feature.column, feature.weight_column) if feature.weight_column else (feature.column,)
        case CrossFeatureConfig():
            return feature.columns
        case TimeFeatureConfig():
            return ("event_time_ms",)
        case BucketFeatureConfig() | DenseFeatureConfig():
            return (feature.column,)


def with_lake_columns(examples: pa.RecordBatch, features: Sequence[FeatureConfig]) -> pa.RecordBatch:
    """Returns examples with the lake's columns that features read, null where they are missing.

    A log leaves out a column of which all is null, such as the country of users as long as no profile is known.
    """
    types, there = column_types(), {*examples.schema.names}
    wanted = dict.fromkeys(column for feature in features for column in columns_of(feature))
    missing = {name: types[name] for name in wanted if name in types and name not in there}
    if not missing:
        return examples
    fields = [*examples.schema, *(pa.field(name, kind) for name, kind in missing.items())]
    arrays = [*examples.columns, *(pa.nulls(examples.num_rows, kind) for kind in missing.values())]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))
