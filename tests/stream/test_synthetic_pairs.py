"""What follows when any video is shown to any user: the same whoever shows it, and as likely as the world says."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.stream import world
from monolith_jax.stream.events import labels
from monolith_jax.stream.synthetic import HEADS, SyntheticConfig, SyntheticSource, examples_of, foreseen, optimal

CONFIG = SyntheticConfig(seed=5, num_examples=40_000, chunk_rows=4_000, live_users=100, live_videos=80, content_dim=3)
OUTCOMES = ("play_time_ms", "dwell_ms", *HEADS[4:-1])


def source() -> pa.RecordBatch:
    return pa.concat_batches([chunk.examples for chunk in SyntheticSource(CONFIG).read({})])


def pairs_of(examples: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    user, video = (
        world.indexes_of(CONFIG.seed, space, examples.column(f"{space}_id").to_numpy()) for space in ("user", "video")
    )
    return examples.column("event_time_ms").to_numpy(), user, video


@pytest.fixture(scope="module")
def streamed() -> pa.RecordBatch:
    return source()


@pytest.fixture(scope="module")
def drawn(streamed: pa.RecordBatch) -> pa.RecordBatch:
    return examples_of(CONFIG, *pairs_of(streamed))


def test_all_but_chance_is_as_in_the_stream(streamed: pa.RecordBatch, drawn: pa.RecordBatch) -> None:
    assert drawn.schema == streamed.schema
    for name in streamed.schema.names:
        assert drawn.column(name).equals(streamed.column(name)) == (name not in OUTCOMES), name


@pytest.mark.parametrize("head", HEADS)
def test_what_follows_is_as_likely_as_the_closed_form(drawn: pa.RecordBatch, head: str) -> None:
    values, masks = labels(drawn, [head])
    best = drawn.column(f"optimal_{head}").to_numpy().astype(np.float64)
    assert masks.all()
    spread = values[:, 0].std() if head == "play_ratio" else np.sqrt((best * (1 - best)).mean())
    error = spread / np.sqrt(len(best))
    assert values.mean() == pytest.approx(best.mean(), abs=4 * error)
    # Also where it is likely, and where it is not.
    high = best > np.median(best)
    for half in (high, ~high):
        assert values[half, 0].mean() == pytest.approx(best[half].mean(), abs=6 * error)


@pytest.mark.parametrize("name", ["play_time_ms", "dwell_ms"])
def test_times_are_distributed_as_in_the_stream(streamed: pa.RecordBatch, drawn: pa.RecordBatch, name: str) -> None:
    mine, theirs = (np.sort(np.log1p(batch.column(name).to_numpy())) for batch in (drawn, streamed))
    at = np.concatenate([mine, theirs])
    apart = np.abs(np.searchsorted(mine, at, "right") - np.searchsorted(theirs, at, "right")).max() / mine.size
    assert apart < 1.95 * np.sqrt(2 / mine.size)  # Kolmogorov and Smirnov: one in a thousand.


def test_chances_of_one_pair_do_not_depend_on_one_another(drawn: pa.RecordBatch) -> None:
    rest = []
    for head in ("click", "like", "profile", "fast_forward", "complete"):
        values, _ = labels(drawn, [head])
        best = drawn.column(f"optimal_{head}").to_numpy()
        rest.append((values[:, 0] - best) / np.sqrt(best * (1 - best)))
    streamed = np.corrcoef(np.stack(rest))
    assert np.abs(streamed[3, :3]).max() < 0.2  # Only what the component of the mixture tells of several.


def test_a_pair_has_the_same_luck_in_any_company(drawn: pa.RecordBatch) -> None:
    time_ms, user, video = pairs_of(drawn)
    rows = np.random.default_rng(0).permutation(500)[:100]
    assert examples_of(CONFIG, time_ms[rows], user[rows], video[rows]).equals(drawn.take(pa.array(rows)))


@pytest.mark.parametrize("other", ["time_ms", "user", "video"])
def test_another_user_video_or_time_has_another_luck(other: str) -> None:
    of = {"time_ms": CONFIG.start_ms + np.arange(2_000), "user": np.zeros(2_000, np.int64), "video": np.zeros(2_000, np.int64)}
    at = {"time_ms": np.full(2_000, CONFIG.start_ms), "user": of["user"], "video": of["video"]}
    at[other] = of["time_ms"] if other == "time_ms" else np.arange(2_000)
    play = examples_of(CONFIG, **at).column("play_time_ms").to_numpy()
    assert len(np.unique(play)) > 500
    clicks = examples_of(CONFIG, **at).column("click").to_numpy(zero_copy_only=False)
    assert np.abs(np.corrcoef(clicks[1:], clicks[:-1])[0, 1]) < 0.1


def test_what_is_foreseen_is_optimal(streamed: pa.RecordBatch) -> None:
    shown, best = foreseen(CONFIG, *pairs_of(streamed))
    assert (shown.duration_ms == streamed.column("duration_ms").to_numpy()).all()
    for head, values in optimal(CONFIG, *pairs_of(streamed)).items():
        assert (values == best[head]).all()
        assert (values == streamed.column(f"optimal_{head}").to_numpy()).all()
