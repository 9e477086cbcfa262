"""A video that is taken out of the catalogue is in no feed from then on, and leaves index and sources."""

from pathlib import Path

import numpy as np

from tests.serve.small_pipeline import NOW_MS, PLAIN, VIDEOS, World, ask, videos


def test_removed_videos_are_shown_no_more(tmp_path: Path) -> None:
    pipeline = World(tmp_path).pipeline(rerank=PLAIN)
    assert pipeline.indexer is not None and pipeline.index is not None
    shown = ask(pipeline).video_ids
    gone = np.union1d(shown, np.arange(20))  # The latter are trending.
    assert pipeline.events.remove(gone) == gone.size
    for user in range(3, 9):
        assert not np.isin(ask(pipeline, user).video_ids, gone).any()
    pipeline.indexer.step()
    assert len(pipeline.index) == len(pipeline.catalogue) == VIDEOS - gone.size
    assert not np.isin(pipeline.sources.trending(100, NOW_MS), gone).any()
    assert not np.isin(pipeline.sources.fresh(1000, NOW_MS), gone).any()
    assert pipeline.events.remove(gone) == 0
    # It may come back.
    pipeline.events.videos(videos(gone))
    pipeline.indexer.step()
    assert len(pipeline.index) == len(pipeline.catalogue) == VIDEOS
    pipeline.close()
