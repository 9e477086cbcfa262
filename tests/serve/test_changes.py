"""What changed in a table since it was last asked for, against sets."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve import changes
from tests.serve.published import Log


def vectors(ids: list[int]) -> tuple[list[int], np.ndarray]:
    return ids, np.full((len(ids), 4), 1.0, np.float32)


IDS = st.sets(st.integers(-2, 9)).map(sorted)


@settings(max_examples=8, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["delta", "delta", "base"]), IDS, IDS, st.booleans()), max_size=6),
    few=st.sampled_from([0, 1 << 16]),
)
def test_changed_ids_are_told_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, list[int], list[int], bool]], few: int
) -> None:
    log = Log(tmp_path_factory.mktemp("log"))
    log.publish({"video": vectors([0, 1, 2])}, kind="base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "_FEW", few)
        served = log.serve(follow=("video",), batch_sizes=(1,))
        there, known, written = {0, 1, 2}, set[int](), {0, 1, 2}
        for kind, ids, gone, asks in [*steps, ("delta", [], [], True)]:
            if asks:
                changed = served.take_changed("video")
                assert changed.written.dtype == changed.deleted.dtype == np.int64
                assert sorted(changed.written.tolist()) == sorted(written & there)
                assert sorted(changed.deleted.tolist()) == sorted(known - there)
                known, written = set(there), set()
            with_dense = kind == "base" or len(ids) % 2 == 1
            deleted = {"video": gone} if kind == "delta" else None
            log.publish({"video": vectors(ids)}, deleted, log.dense if with_dense else None, kind=kind)
            assert served.poll() == 1
            there = set(ids) if kind == "base" else (there - set(gone)) | set(ids)
            written = written | set(ids)


def test_what_comes_and_goes_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_FEW", 8)
    log = Log(tmp_path)
    log.publish({"video": vectors([1])}, kind="base")
    served = log.serve(follow=("video",))
    served.take_changed("video")
    for number in range(30):
        log.publish(
            {"video": vectors(list(range(10 * number, 10 * number + 10)))}, {"video": range(10 * number - 10, 10 * number)}
        )
    served.poll()
    of_table = served._changes._tables["video"]
    of_table.merge()
    assert of_table.sorted.ids.size <= 11
    changed = served.take_changed("video")
    assert sorted(changed.written.tolist()) == list(range(290, 300)) and changed.deleted.tolist() == [1]


def test_a_table_has_to_be_followed(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.publish({}, kind="base")
    with pytest.raises(ValueError, match="there is no table 'sound'"):
        log.serve(follow=("sound",))
    with pytest.raises(ValueError, match=r"'user' is not followed \(followed: video\)"):
        log.serve(follow=("video",)).take_changed("user")
