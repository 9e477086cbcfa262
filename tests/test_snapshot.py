"""Snapshots: bit-equal, whole or not there at all, refused where the config differs."""

import gc
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monolith_jax.mesh import ROWS, MeshConfig, make_mesh, sharding
from monolith_jax.packing import pack, stacked
from monolith_jax.snapshot import Committed, Restored, SnapshotConfig, Snapshots, differences, find

IDENTITY = {"tables": [{"name": "user", "dim": 4}, {"name": "tag", "dim": 8}], "seed": 0, "hidden": [3, 4]}


class State(NamedTuple):
    """Like a training state: a scalar, nested weights, an optimizer's state with empty parts, many groups."""

    step: Any
    weights: Any
    groups: tuple[Any, ...]


def make_state(seed: int, num_devices: int = 1) -> State:
    rng = np.random.default_rng(seed)
    rows = sharding(make_mesh(MeshConfig(num_devices=num_devices, num_shards=8)), ROWS)
    groups = [rng.normal(size=(8, 3, 1 + index)).astype(np.float32) for index in range(12)]
    groups[0][0, 0, 0] = np.nan
    groups[1][0, 0, 0] = -0.0
    weights = {"a": {"0": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}, "b": [(), jnp.ones(()), None, {}]}
    return State(jnp.int32(seed), weights, tuple(jax.device_put(group, rows) for group in groups))


def make_host(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    maps = [
        {"lines": rng.integers(0, 2**32, (2, 5, 16), np.uint32), "counts": rng.integers(0, 9, (2, 1), np.int32)}
        for _ in range(11)
    ]
    memories = [
        {"items": rng.integers(-(2**63), 2**63 - 1, (7, 3)), "maps.lines": np.zeros((0, 4), np.uint32)},
        {"bits": rng.integers(0, 255, 9, np.uint8), "scalar": np.float64(rng.random()).reshape(())},
    ]
    stream = {"position": {"file": "ä.csv", "byte": 2**40}, "row": 3}
    packed = [pack({"memories": memories, "stream": stream}), pack({"memories": [], "stream": {}})]
    return {"maps": maps, "parts": stacked(packed), "step": seed}


def make_extras(seed: int) -> dict[str, Any]:
    arrays = {"sums/complete": np.random.default_rng(seed).random(5), "empty": np.zeros((0, 2)), "at/b/c": np.array([True])}
    return {"bytes": 123, "step": seed, "arrays": arrays}


def assert_same(one: Any, other: Any) -> None:
    """Compares trees bit for bit, types included."""
    leaves, structure = jax.tree.flatten(one)
    other_leaves, other_structure = jax.tree.flatten(other)
    assert structure == other_structure
    for a, b in zip(leaves, other_leaves, strict=True):
        if isinstance(a, np.ndarray | jax.Array):
            a, b = np.asarray(a), np.asarray(b)
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        else:
            assert a == b


def saved(folder: Path, *steps: int, keep: int = 2) -> Snapshots:
    snapshots = Snapshots(SnapshotConfig(keep=keep), folder)
    for step in steps:
        snapshots.save(step, make_state(step), make_host(step), make_extras(step), IDENTITY)
    snapshots.wait()
    return snapshots


def assert_is(restored: Restored, step: int) -> None:
    assert restored.step == step
    assert_same(restored.state, make_state(step))
    assert_same(restored.host, make_host(step))
    assert_same(restored.extras, make_extras(step))


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    snapshots = saved(tmp_path / "new" / "folder", 5)
    assert_is(snapshots.restore(5, make_state(0), IDENTITY), 5)
    snapshots.close()
    # Another process, and another mesh.
    snapshots = Snapshots(SnapshotConfig(), tmp_path / "new" / "folder")
    assert snapshots.latest() == 5
    restored = snapshots.restore(5, make_state(0, num_devices=8), IDENTITY)
    assert_is(restored, 5)
    assert len(restored.state.groups[0].sharding.device_set) == 8
    snapshots.close()


def test_plain_restore_needs_no_example(tmp_path: Path) -> None:
    saved(tmp_path, 3).close()
    reader = Snapshots(SnapshotConfig(), tmp_path, read_only=True)
    restored = reader.restore_plain(3)
    reader.close()
    state = make_state(3)
    assert len(restored.state["groups"]) == 12
    for one, other in zip(restored.state["groups"], state.groups, strict=True):
        assert isinstance(one, np.ndarray)
        assert_same(one, np.asarray(other))
    assert_same(restored.state["weights"]["a"]["0"], np.asarray(state.weights["a"]["0"]))
    assert_same(restored.host, make_host(3))


def test_arrays_may_change_once_save_has_returned(tmp_path: Path) -> None:
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    state, host, extras = make_state(1), make_host(1), make_extras(1)
    snapshots.save(1, state, host, extras, IDENTITY)
    change = jax.jit(lambda groups: tuple(group * 0 - 7 for group in groups), donate_argnums=0)
    jax.block_until_ready(change(state.groups))
    snapshots.wait()
    assert_is(snapshots.restore(1, make_state(0), IDENTITY), 1)
    snapshots.close()


def test_old_ones_are_deleted(tmp_path: Path) -> None:
    snapshots = saved(tmp_path, 1, 2, 3, 4, keep=2)
    snapshots.close()
    assert sorted(int(child.name) for child in tmp_path.iterdir() if child.name.isdigit()) == [3, 4]


def test_there_is_none(tmp_path: Path) -> None:
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    assert snapshots.latest() is None
    snapshots.close()


def test_saving_a_step_again_keeps_what_is_there(tmp_path: Path) -> None:
    snapshots = saved(tmp_path, 4)
    snapshots.save(4, make_state(9), make_host(9), make_extras(9), IDENTITY)
    snapshots.wait()
    assert_is(snapshots.restore(4, make_state(0), IDENTITY), 4)
    snapshots.close()


def test_differences_are_named(tmp_path: Path) -> None:
    snapshots = saved(tmp_path, 1)
    ours = {"tables": [{"name": "user", "dim": 5}, {"name": "tag", "dim": 8}], "seed": 1, "hidden": [3, 4, 5], "new": True}
    with pytest.raises(ValueError, match=r"the snapshot of step 1 in .* is of another config") as caught:
        snapshots.restore(1, make_state(0), ours)
    snapshots.close()
    told = str(caught.value).splitlines()
    assert [line.strip() for line in told[1:-1]] == [
        "tables.user.dim: 4 in the snapshot, 5 here",
        "seed: 0 in the snapshot, 1 here",
        "hidden: [3, 4] in the snapshot, [3, 4, 5] here",
        "new: null in the snapshot, true here",
    ]
    assert "--workdir" in told[-1] and "TrainConfig.warm_start" in told[-1]


def test_configs_added_left_out_or_moved_are_named() -> None:
    user, tag = {"name": "user", "dim": 4}, {"name": "tag", "dim": 8}
    assert differences([user, tag], [user], "tables") == ['tables.tag: {"name": "tag", "dim": 8} in the snapshot, null here']
    assert differences([user], [user, tag], "tables") == ['tables.tag: null in the snapshot, {"name": "tag", "dim": 8} here']
    assert differences([user, tag], [tag, user], "tables") == ["tables: user, tag in the snapshot, in the order tag, user here"]
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []
    (line,) = differences({"a": "x" * 500}, {"a": "y"})
    assert len(line) < 200


def test_leftovers_of_interrupted_saves_are_no_snapshots(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2).close()
    # What a kill leaves behind: a folder that was never renamed.
    shutil.copytree(tmp_path / "2", tmp_path / "7.orbax-checkpoint-tmp-123")
    reader = Snapshots(SnapshotConfig(), tmp_path, read_only=True)
    assert reader.latest() == 2
    assert_is(reader.restore(2, make_state(0), IDENTITY), 2)
    reader.close()
    assert (tmp_path / "7.orbax-checkpoint-tmp-123").exists(), "a reader must not touch what another process writes"
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    assert snapshots.latest() == 2
    assert_is(snapshots.restore(2, make_state(0), IDENTITY), 2)
    # They are removed in the background, at the latest before the next save.
    snapshots.save(8, make_state(8), make_host(8), make_extras(8), IDENTITY)
    snapshots.close()
    assert not (tmp_path / "7.orbax-checkpoint-tmp-123").exists()


def test_what_is_whole_is_told_with_its_size(tmp_path: Path) -> None:
    told: list[Committed] = []
    snapshots = Snapshots(SnapshotConfig(), tmp_path, tell=told.append)
    snapshots.prepare(make_state(0))
    for step in (3, 5, 5):
        snapshots.save(step, make_state(step), make_host(step), make_extras(step), IDENTITY)
    snapshots.wait()
    assert [one.step for one in told] == [3, 5]
    sizes = [sum(path.stat().st_size for path in (tmp_path / str(step)).rglob("*") if path.is_file()) for step in (3, 5)]
    assert [one.num_bytes for one in told] == sizes and min(one.seconds for one in told) > 0
    assert_is(snapshots.restore(3, make_state(0), IDENTITY), 3)
    snapshots.close()


def test_what_the_background_met_is_raised_once_and_the_next_save_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "_begin", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        snapshots.save(1, make_state(1), make_host(1), make_extras(1), IDENTITY)
        with pytest.raises(OSError, match="no space left"):
            snapshots.wait()
    snapshots.save(2, make_state(2), make_host(2), make_extras(2), IDENTITY)
    snapshots.wait()
    assert snapshots.latest() == 2
    assert_is(snapshots.restore(2, make_state(0), IDENTITY), 2)
    snapshots.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that fail after the first one
@pytest.mark.parametrize("damage", ["lost", "cut"])
@pytest.mark.parametrize("part", ["state", "maps", "arrays", "meta"])
def test_damage_is_an_error_and_never_garbage(tmp_path: Path, part: str, damage: str) -> None:
    saved(tmp_path, 1).close()
    files = [path for path in (tmp_path / "1" / part).rglob("*") if path.parent.name == "d" or path.name == "metadata"]
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    errors = 0
    for path in files:
        whole = path.read_bytes()
        path.unlink() if damage == "lost" else path.write_bytes(whole[: len(whole) // 2])
        try:
            restored = snapshots.restore(1, make_state(0), IDENTITY)
        except ValueError as error:
            assert f"the snapshot in {tmp_path / '1'} cannot be read" in str(error)
            errors += 1
        else:
            assert_is(restored, 1)  # a file that is not needed
        path.write_bytes(whole)
    snapshots.close()
    gc.collect()  # what the failed reads left behind complains here, not in a later test
    assert errors


def test_find(tmp_path: Path) -> None:
    saved(tmp_path / "quickstart" / "snapshots", 1).close()
    assert find(tmp_path / "quickstart") == tmp_path / "quickstart" / "snapshots"
    assert find(tmp_path / "quickstart" / "snapshots") == tmp_path / "quickstart" / "snapshots"
    with pytest.raises(ValueError, match=r"no snapshot in .*quickstrat; did you mean .*quickstart\?"):
        find(tmp_path / "quickstrat")
    with pytest.raises(ValueError, match="no snapshot in"):
        find(tmp_path / "not" / "there")
