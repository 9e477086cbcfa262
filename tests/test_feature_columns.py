import pyarrow as pa

from monolith_jax.feature_columns import columns_of, with_lake_columns
from monolith_jax.features import CrossFeatureConfig, DenseFeatureConfig, IdFeatureConfig
from monolith_jax.lake.rows import FeatureRows, column_types

FEATURES = (
    IdFeatureConfig(name="country", column="user_country", table="t"),
    IdFeatureConfig(name="tags", column="video_tag_id", table="t", max_length=3, weight_column="weights"),
    CrossFeatureConfig(name="cross", columns=("user_country", "author_id"), table="t"),
    DenseFeatureConfig(name="views", column="video_views_5m"),
)


def test_columns_that_a_log_left_out_are_null() -> None:
    examples = pa.record_batch({"author_id": [1, 2], "user_country": ["at", None]})
    found = with_lake_columns(examples, FEATURES)
    assert found.schema.names == ["author_id", "user_country", "video_tag_id", "video_views_5m"]
    assert found.column("user_country").equals(examples.column("user_country"))
    assert found.column("video_tag_id").type == pa.list_(pa.int64()) and found.column("video_tag_id").null_count == 2
    assert with_lake_columns(found, FEATURES) is found, "weights are no column of the lake, and are missed by their feature"


def test_every_column_of_the_lake_has_a_type() -> None:
    names = [name for subject in ("user", "video") for name in FeatureRows(subject).columns]
    assert names == list(column_types()) and column_types()["video_quality"] == pa.float64()
    assert columns_of(FEATURES[1]) == ("video_tag_id", "weights")
