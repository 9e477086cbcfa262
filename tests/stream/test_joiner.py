import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monolith_jax.stream.events import ACTIONS
from monolith_jax.stream.joiner import Joiner, JoinerConfig
from monolith_jax.stream.router import Router
from tests.stream.joiner_load import WINDOW_S, run
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
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    assert not small._buckets.spill._num_parts, "what is not held any more is not kept on disk"
    small.close()
    large.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", CONFIGS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    joiner.close()


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


def test_impressions_may_gain_columns(tmp_path: Path) -> None:
    for memory_mb in (1e-6, 256):
        joiner = Joiner(JoinerConfig(window_s=1.0, memory_mb=memory_mb), tmp_path / "spill")
        joiner.join(1, impressions([Shown(1, 1, 100, 5)]), None, 0)
        joiner.join(2, impressions([Shown(1, 2, 150, 6), Shown(1, 3, 100, 7)], further=True), None, 0)
        joiner.join(3, impressions([Shown(1, 4, 100, 8)]), None, 0)
        batch = joiner.join(4, None, None, 5000)
        assert batch is not None
        assert [(row["user_id"], row["gained"]) for row in batch.to_pylist()] == [(35, None), (49, 7), (56, None), (42, 6)]
        joiner.close()


@pytest.mark.parametrize("memory_mb", [1e-6, 256])
def test_takes_dictionaries_slices_and_metadata(memory_mb: float, tmp_path: Path) -> None:
    joiner = Joiner(JoinerConfig(window_s=1.0, memory_mb=memory_mb), tmp_path / "spill")
    for cut in range(3):
        batch = impressions([Shown(at, cut, 100 + cut, at) for at in range(100)])
        assert batch is not None
        batch = batch.append_column("country", pa.array([f"c{cut}", "d"] * 50).dictionary_encode())
        joiner.join(cut, batch.replace_schema_metadata({"cut": str(cut)}).slice(10 * cut, 2), None, 0)
    examples = joiner.join(3, None, None, 5000)
    assert examples is not None
    assert examples.column("country").to_pylist() == ["c0", "d", "c1", "d", "c2", "d"]
    assert examples.column("request_id").to_pylist() == [0, 1, 10, 11, 20, 21]
    joiner.close()


def test_keeps_a_share_of_the_negatives(tmp_path: Path) -> None:
    config = JoinerConfig(window_s=1.0, positive="like", negative_rate=0.25)
    joiner = Joiner(config, tmp_path / "spill")
    shown = [Shown(at, 1, 100, at) for at in range(4000)]
    done = [Done(at, 1, 100, "like" if at % 2 else "click", None, None) for at in range(0, 4000, 5)]
    joiner.join(1, impressions(shown), actions(done), 0)
    batch = joiner.join(2, None, None, 5000)
    assert batch is not None
    kept = batch.to_pylist()
    assert all(row["weight"] == (1 if row["like"] else 4) for row in kept)
    assert sum(row["like"] for row in kept) == 400
    assert 800 < len(kept) - 400 < 1000
    assert joiner.counts["negatives_dropped"] == 4000 - len(kept)
    joiner.close()


def test_holds_what_its_budget_allows(tmp_path: Path) -> None:
    # 300,000 open impressions of about 90 bytes, and as many actions of 48, in 4 MB, of which the router has 1.9.
    out = []
    for memory_mb in (4, 1024):
        joiner = Joiner(JoinerConfig(window_s=WINDOW_S, memory_mb=memory_mb), tmp_path / "spill")
        told = list(run(joiner, 0, 50, 10_000, 30))
        assert max(float(one["memory_mb"]) for one in told) < memory_mb
        assert max(int(one["num_open"]) for one in told) > 300_000
        assert (joiner.counts["spilled_bytes"] > 40e6) == (memory_mb == 4)
        out.append([one["digest"] for one in told])
        joiner.close()
    assert out[0] == out[1]


@pytest.mark.slow
def test_ten_million_open_impressions_survive_a_kill(tmp_path: Path) -> None:
    cuts, stop = 540, 520
    whole = list(run_apart(tmp_path / "whole", 0, cuts))
    assert len(whole) == cuts and max(one["num_open"] for one in whole) > 10_000_000
    assert max(one["memory_mb"] for one in whole) < 64
    # What is in hand during a call, and what the allocators keep, comes on top.
    assert max(one["anon_mb"] for one in whole) < 160
    killed = list(run_apart(tmp_path / "killed", 0, stop, kill=True))
    again = list(run_apart(tmp_path / "killed", killed[-1]["oldest_cut"], cuts))
    assert [one["digest"] for one in again if one["cut"] >= stop] == [one["digest"] for one in whole[stop:]]


def run_apart(folder: Path, first: int, last: int, kill: bool = False) -> Iterator[dict[str, Any]]:
    """Runs `joiner_load` in another process; with `kill` it is killed behind the last cut, in the midst of the next ones."""
    command = [sys.executable, "-m", "tests.stream.joiner_load", str(folder), "64", str(first), str(last + 100 * kill)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told = json.loads(line)
            yield told
            if kill and told["cut"] == last - 1:
                process.kill()
                return
        assert process.wait() == 0


def test_refuses_what_it_cannot_join(tmp_path: Path) -> None:
    joiner = Joiner(JoinerConfig(window_s=1.0), tmp_path / "spill")
    batch = impressions([Shown(1, 1, 100, 5)])
    assert batch is not None
    joiner.join(1, batch, None, 50)
    with pytest.raises(ValueError, match="numbers must ascend"):
        joiner.join(1, None, None, 50)
    with pytest.raises(ValueError, match="watermark goes back"):
        joiner.join(2, None, None, 49)
    with pytest.raises(ValueError, match="rename"):
        joiner.join(3, batch.append_column("like", pa.array([True])), None, 50)
    with pytest.raises(ValueError, match="'request_id', int64 without nulls"):
        joiner.join(4, batch.drop_columns(["request_id"]), None, 50)
    with pytest.raises(ValueError, match="'score' was float before"):
        joiner.join(5, batch.set_column(6, "score", pa.array([1])), None, 50)
    with pytest.raises(ValueError, match="actions need the column 'value'"):
        joiner.join(6, batch, batch, 50)
    # A refused cut has changed nothing.
    assert joiner.counts["impressions"] == 1
    assert joiner.join(2, batch, None, 50) is None
    assert joiner.counts["duplicates"] == 1
    joiner.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"window_s": 0},
        {"emit": "never"},
        {"late_s": -1},
        {"negative_rate": 0, "positive": "like"},
        {"negative_rate": 0.5},
        {"positive": "love"},
        {"emit": "at_once", "late_s": 1},
        {"memory_mb": 0},
    ],
)
def test_config_is_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="JoinerConfig"):
        JoinerConfig(**fields)
