import dataclasses
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monolith_jax.stream.events import ACTIONS
from monolith_jax.stream.joiner import Joiner, JoinerConfig
from monolith_jax.stream.router import Router
from tests.stream.joiner_oracle import Cut, Done, Shown, actions, impressions, run_oracle

CONFIGS = {
    "close": JoinerConfig(window_s=1.0),
    "late": JoinerConfig(window_s=1.0, late_s=0.7),
    "at_once": JoinerConfig(window_s=1.0, emit="at_once"),
}
KINDS = ("play", "dwell", "click", "like", "fast_forward")


def random_cuts(seed: int, number: int = 14, per_cut: int = 14, keys: int = 8, reach: int = 900) -> list[Cut]:
    """Cuts of events in disorder, in time and between impressions and actions, with repeats; the last closes everything."""
    rng = random.Random(seed)
    cuts, now, mark = [], 5000, 0
    for at in range(number):
        shown, done = [], []
        for _ in range(rng.randrange(per_cut)):
            time = now + rng.randint(-reach, reach // 2)
            request, video = rng.randrange(keys), rng.randrange(2)
            if rng.random() < 0.4:
                mark += 1
                shown.append(Shown(request, video, time, mark))
            else:
                event = None if rng.random() < 0.3 else rng.randrange(6)
                value = None if rng.random() < 0.2 else rng.randrange(1000)
                done.append(Done(request, video, time, rng.choice(KINDS), value, event))
        cuts.append(Cut(at * 3 + 1, shown, done, now - 300))
        now += rng.choice((0, 1, 50, 200, 200, 900))
    return [*cuts, Cut(number * 3 + 1, [], [], now + 100_000)]


def feed(joiner: Joiner, cut: Cut) -> pa.RecordBatch | None:
    return joiner.join(cut.number, impressions(cut.shown), actions(cut.done), cut.watermark)


def rows(batch: pa.RecordBatch | None) -> list[dict[str, Any]]:
    return [] if batch is None else batch.to_pylist()


@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize("tag_bits", [22, 2])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), keys=st.sampled_from([3, 8, 200]))
def test_joins_as_the_rules_say(seed: int, keys: int, mode: str, tag_bits: int, tmp_path: Path) -> None:
    cuts = random_cuts(seed, keys=keys)
    expected, counts = run_oracle(CONFIGS[mode], cuts)
    small = Joiner(dataclasses.replace(CONFIGS[mode], memory_mb=1e-6), tmp_path / "small")
    large = Joiner(CONFIGS[mode], tmp_path / "large")
    small._buckets.router, large._buckets.router = Router(1, tag_bits), Router(1, tag_bits)
    for cut, wanted in zip(cuts, expected, strict=True):
        assert rows(feed(large, cut)) == wanted
        assert rows(feed(small, cut)) == wanted
        assert small.counts | {"spilled_bytes": 0} == large.counts
        assert (small.num_open, small.oldest_cut) == (large.num_open, large.oldest_cut)
    assert {name: large.counts[name] for name in counts} == counts
    assert large.num_open == 0 and small.counts["spilled_bytes"] > 0
    assert not list((tmp_path / "small").iterdir())
    small.close()
    large.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", CONFIGS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), keys=st.sampled_from([2, 8, 200]))
def test_goes_on_from_the_oldest_cut(seed: int, keys: int, mode: str, tmp_path: Path) -> None:
    cuts = random_cuts(seed, keys=keys, number=12)
    joiner = Joiner(CONFIGS[mode], tmp_path / "one")
    out, states = [], []
    for cut in cuts:
        out.append(feed(joiner, cut))
        states.append((joiner.oldest_cut, joiner.counts, joiner.num_open))
    for stop in range(1, len(cuts)):
        oldest, counts, num_open = states[stop - 1]
        again = Joiner(CONFIGS[mode], tmp_path / "two")
        for cut in cuts[:stop]:
            if cut.number >= oldest:
                feed(again, cut)
        assert again.num_open == num_open
        again.set_counts(counts)
        for at in range(stop, len(cuts)):
            batch = feed(again, cuts[at])
            assert (batch is None) == (out[at] is None)
            assert batch is None or batch.equals(out[at])
            assert (again.oldest_cut, again.counts, again.num_open) == states[at]
        again.close()


def test_an_example_has_every_outcome(tmp_path: Path) -> None:
    joiner = Joiner(JoinerConfig(window_s=1.0), tmp_path / "spill")
    assert joiner.join(1, impressions([Shown(1, 2, 100, 5)]), None, 0) is None
    assert joiner.oldest_cut == 1 and joiner.num_open == 1
    done = [Done(1, 2, 150, "play", 40, None), Done(1, 2, 160, "play", 30, None), Done(1, 2, 170, "like", None, None)]
    assert joiner.join(2, None, actions(done), 1099) is None
    batch = joiner.join(3, None, None, 1100)
    assert batch is not None
    row = batch.to_pylist()[0]
    assert row["play_time_ms"] == 40 and row["dwell_ms"] is None and row["tags"] == [5, 5]
    assert [name for name in ACTIONS if row[name]] == ["like"]
