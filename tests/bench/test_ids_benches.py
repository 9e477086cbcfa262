"""The benchmarks of the id maps: the paper's collisions in full, the rest on small maps for its names and its sense."""

import json

import numpy as np
import pytest

from launch.bench import collisions, id_once, ids
from launch.bench.id_kernels import Dedup, Streams, layout_of, limit, limit_blocks, slots_of, zipf_ranks
from launch.bench.id_rounds import LEAST_ROUNDS, Rounds
from monolith_jax.ids.cuckoo import IdMaps

SLOTS = 2**14
ROUND_NAMES = {
    "rounds", "limit_ids_per_s", "limit_zipf_ids_per_s", "limit_miss_ids_per_s", "limit_blocks_ids_per_s",
    "limit_blocks_zipf_ids_per_s", "limit_blocks_miss_ids_per_s", "hit_uniform_ids_per_s", "hit_zipf_ids_per_s",
    "miss_ids_per_s", "hit_uniform_over_limit", "hit_zipf_over_limit", "miss_over_limit", "hit_uniform_over_limit_blocks",
    "hit_zipf_over_limit_blocks", "miss_over_limit_blocks", "touch_zipf_ids_per_s", "insert3_zipf_ids_per_s",
    "insert3_distinct_zipf_ids_per_s", "insert3_zipf_over_hit_zipf", "insert3_distinct_zipf_over_hit_zipf", "unique_ids_per_s",
    "unique_over_numpy", "unique_by_shard_over_numpy", "unique_over_pandas", "plan_ids_per_s", "plan_over_hit_zipf",
    "threads2_scaling", "lookup_threads2_scaling", "limit_threads2_scaling", "compute_threads2_scaling",
}  # fmt: skip
START_NAMES = {"cold_start_s", "warm_start_s"}
ONCE_NAMES = {
    "max_load_reached", "bytes_per_entry", "longest_over_median", "longest_s", "filter_false_admit", "filter_missed",
    "filter_window_false_admit", "filter_window_missed",
}  # fmt: skip


def test_collisions_are_the_papers_and_ours_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert collisions.main([]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == {
        "users": 162_541,
        "users_after_hash": 149_970,
        "users_ours": 162_541,
        "movies": 59_047,
        "movies_after_hash": 57_361,
        "movies_ours": 59_047,
        "collisions_hash": 14_257,
        "collisions_ours": 0,
    }


def test_all_figures_are_there_and_make_sense(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The processes that start with an empty cache have a test of their own.
    monkeypatch.setattr(id_once, "starts", lambda: dict.fromkeys(START_NAMES, 0.25))
    assert ids.main([f"--slots={SLOTS}", "--load=0.5", "--seconds=0", "--threads=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert set(figures) >= ROUND_NAMES | ONCE_NAMES | START_NAMES | {"slots", "load", "threads", "missed"}
    assert set(ids.DEMANDS) - {"peak_rss_gb"} <= set(figures)
    assert figures["rounds"] == LEAST_ROUNDS and figures["threads"] == 3
    assert figures["load"] == pytest.approx(0.5, abs=1e-3)
    assert 16 / 0.85 < figures["bytes_per_entry"] < 20
    assert 0.7 < figures["max_load_reached"] < 1
    assert figures["filter_false_admit"] < 0.02 and figures["filter_missed"] < 0.02
    assert figures["plan_ids_per_s"] == figures["plan_threads3_ids_per_s"]
    rates = [figures[name] for name in ROUND_NAMES if name.endswith("ids_per_s")]
    assert min(rates) > 1000
    for name in ids.DEMANDS:
        if name in figures and figures[name] is not None:
            assert (name in figures["missed"]) == (ids.is_met(name, figures[name]) is False)
    assert any("filter_missed" in line and "<= 0.0005" in line for line in lines)


@pytest.mark.slow
def test_first_plans_are_timed() -> None:
    figures = id_once.starts()
    assert set(figures) == START_NAMES
    assert 0 < figures["warm_start_s"] < figures["cold_start_s"]


def test_sustained_holds_its_entries() -> None:
    said: list[str] = []
    figures = id_once.sustained(50_000, 80, 2, 0.0, said.append, least_steps=70)
    assert said == ["50,000 ids are in"]
    assert figures["steps"] == 70 and figures["refused_at_cap"] == figures["refused_no_path"] == 0
    assert figures["new_per_step"] >= 10  # Ten are seen three times at once; later ones can be of those seen once.
    assert figures["entries"] == 50_000 + 70 * (figures["new_per_step"] - figures["freed_per_step"])
    assert figures["freed_per_step"] > 0
    assert 0 < figures["step_p50_ms"] <= figures["step_p99_ms"] <= figures["step_longest_ms"]
    assert 0.01 < figures["peak_rss_gb"] < 100


@pytest.mark.parametrize(
    ("name", "value", "met"),
    [
        ("max_load_reached", 0.95, True),
        ("max_load_reached", 0.949, False),
        ("filter_missed", 0.0005, True),
        ("filter_missed", 0.00051, False),
        ("filter_missed", None, None),
        ("limit_ids_per_s", 1.0, None),
    ],
)
def test_demands(name: str, value: float | None, met: bool | None) -> None:
    assert ids.is_met(name, value) is met


@pytest.mark.parametrize("wrong", ["--slots=100", "--load=0.9", "--load=0", "--threads=0"])
def test_wrong_arguments_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ids.main([wrong])
    assert "expected --slots from 4096 on" in capsys.readouterr().err


@pytest.mark.parametrize("number", [1, 47, 48, 49, 95, 96, 97, 1000])
def test_limits_read_each_ids_first_line(number: int) -> None:
    layout = layout_of(SLOTS)
    maps, rng = IdMaps(layout), np.random.default_rng(number)
    ids_of_batch = rng.integers(0, 2**64, number, dtype=np.uint64)
    shards, rows, fresh, *_ = maps.lookup_or_insert(ids_of_batch, 0, np.zeros(number, np.uint32))
    assert fresh.all() and (shards >= 0).all() and (rows >= 0).all()
    maps.arrays.lines[:, 8] = (
        np.arange(len(maps.arrays.lines)) ** 2
    )  # The word that is read tells the line; 0 in line 0, which the plain form reads first.
    hashes = maps.hashes_of(ids_of_batch, 0).tolist()
    buckets = int(layout.num_buckets[0])
    lines = [(h >> 58) * layout.lines_per_shard + ((h & 0xFFFFFFFF) * buckets >> 32) for h in hashes]
    expected = sum(line**2 for line in lines)
    assert limit(ids_of_batch, 0, layout.tables, maps.arrays.lines) == expected
    assert limit_blocks(ids_of_batch, 0, layout.tables, maps.arrays.lines) == expected


def test_dedup_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    streams = Streams(rng, rng.integers(0, 2**64, 500, dtype=np.uint64), 2000)
    layout = layout_of(SLOTS)
    dedup, drawn = Dedup(layout.tables, 2000), streams.zipf()
    inverse = dedup.run_in_order(drawn)
    hashes = IdMaps(layout).hashes_of(drawn, 0)
    assert (dedup.distinct.hashes[inverse] == hashes).all()
    values, counts = np.unique(hashes, return_counts=True)
    assert int(dedup.distinct.numbers.sum()) == values.size < 500
    of_hash = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert all(of_hash[int(h)] == n for h, n in zip(hashes, dedup.distinct.counts[inverse], strict=True))


def test_streams_hold_what_they_say() -> None:
    rng = np.random.default_rng(0)
    stored = np.arange(100_000, dtype=np.uint64)
    streams = Streams(rng, stored, 50_000)
    assert not np.isin(streams.missing(), stored).any()
    assert np.isin(streams.uniform(), stored).all() and np.isin(streams.zipf(), stored).all()
    is_new = ~np.isin(drawn := streams.zipf_and_new(), stored)
    assert is_new.mean() == pytest.approx(0.03, rel=0.1) and np.unique(drawn[is_new]).size == is_new.sum()
    distinct = streams.distinct_and_new()
    assert np.unique(distinct).size == distinct.size
    # Of zipf(1.05) over 10^5 ids, the first rank has (2^-0.05 - 1) / (N^-0.05 - 1) by the continuous distribution.
    share = (zipf_ranks(rng, 100_000, 200_000) == 0).mean()
    assert share == pytest.approx((2**-0.05 - 1) / (100_001**-0.05 - 1), rel=0.05)


@pytest.mark.parametrize("slots", [2**12, 2**14, 2**20, 2**24])
def test_layout_has_the_slots_asked_for(slots: int) -> None:
    assert slots_of(layout_of(slots)) == pytest.approx(slots, rel=0.0 if slots > 2**15 else 0.25)


def test_maps_that_are_too_small_for_the_load_say_so() -> None:
    with pytest.raises(ValueError, match="expected more slots or less load"):
        Rounds(SLOTS, 0.84, 1)
