"""Which columns a request reads, and who has them: itself, the catalogue, or the cache of the lake's features.

In: the features of the models, and what is known of whom. Out: names of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from monolith_jax.feature_columns import columns_of
from monolith_jax.serve.catalogue import CatalogueConfig
from monolith_jax.serve.encode import Encoder
from monolith_jax.serve.feature_cache import FeatureCache
from monolith_jax.serve.rank import Ranker


@dataclass(frozen=True)
class ReadColumns:
    """Names of columns."""

    catalogue: list[str]
    """Of a candidate: those of the rules, and those that are crossed with others."""
    request: list[str]
    """Of the row of a request: what features of the user and of the request read, those of `user` among them."""
    user: tuple[str, ...] = ()
    """That the cache has of the user, with the times of their groups: they are logged."""
    video: tuple[str, ...] = ()
    """That the cache has of a candidate, likewise."""


def read_columns(
    config: CatalogueConfig, ranker: Ranker | None, encoder: Encoder | None, cache: FeatureCache | None
) -> ReadColumns:
    """Returns what the features of the models read.

    Raises:
        ValueError: The tower of videos reads a column of the cache: vectors in the index do not change with it.
    """
    of_candidates = ["author_id", "sound_id", "tag_id", "duration_ms"]
    layouts = [ranker.once_layout] if ranker else []
    layouts += [encoder.user_layout] if encoder else []
    of_requests = ["user_id", "event_time_ms", *(ranker.crosses.request_columns if ranker else ())]
    of_requests += [column for layout in layouts for feature in layout.features for column in columns_of(feature)]
    if ranker:
        of_candidates += ranker.crosses.candidate_columns
    unsafe = [config.unsafe_column] if config.unsafe_column else []
    catalogue = [name for name in dict.fromkeys(of_candidates) if name in config.columns] + unsafe
    if cache is None:
        return ReadColumns(catalogue, list(dict.fromkeys(of_requests)))
    for feature in encoder.video_layout.features if encoder else ():
        if found := sorted(set(columns_of(feature)) & set(cache.columns("video"))):
            raise ValueError(
                f"feature {feature.name!r} of the two-tower's videos reads {', '.join(found)}, which changes all the time; the "
                "vectors of the index would not: leave it out of TwoTowerConfig.video_features"
            )
    live = [column for feature in ranker.live_layout.features for column in columns_of(feature)] if ranker else []
    user, video = cache.wanted("user", of_requests), cache.wanted("video", [*live, *of_candidates])
    return ReadColumns(catalogue, list(dict.fromkeys([*of_requests, *user])), user, video)
