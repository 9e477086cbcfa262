import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from launch import sort
from monolith_jax.stream.events import EXAMPLE, labels
from monolith_jax.stream.kuairand import KuaiRandConfig, KuaiRandSource
from tests.stream.resume import assert_resumes, counts_of, reasons_of, rows_of

T0 = 1_649_400_000_000
HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,"
    "duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)


def line(
    user: object = 1, video: object = 2, time: object = T0, play: object = 5000, duration: object = 9000, like: object = 0
) -> str:
    return f"{user},{video},20220408,1200,{time},1,{like},0,0,1,0,0,{play},{duration},0,7,0,0,3"


def write_log(folder: Path, lines: list[str], name: str = "log_standard_4_08_to_4_21_pure.csv") -> Path:
    path = folder / name
    text = "\n".join([HEADER, *lines]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def write_features(folder: Path, ending: str = "_pure.csv") -> None:
    users = "user_id,user_active_degree,follow_user_num,onehot_feat4\n1,full_active,7,2.0\n3,UNKNOWN,0,\n"
    videos = (
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,"
        'music_type,tag\n5,50,AD,2022-04-30,Web,0,,1,1,500,9,\n2,20,NORMAL,2022-04-06,Kmovie,0,1.0,1,1,200,9,"12,65"\n'
    )
    for name, text in (("user_features", users), ("video_features_basic", videos)):
        (folder / (name + ending)).write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    (folder / f"video_features_statistic{ending}").write_text("video_id,counts\n2,1\n")


def source(folder: Path, **fields: object) -> KuaiRandSource:
    return KuaiRandSource(KuaiRandConfig(folder=str(folder), **{"features": False, "chunk_rows": 3, **fields}))  # pyright: ignore


@pytest.mark.parametrize("ending", ["_pure.csv", "_1k.csv.gz"])
def test_reads_the_official_layout(tmp_path: Path, ending: str) -> None:
    data = tmp_path / "KuaiRand" / "data"
    data.mkdir(parents=True)
    write_features(data, ending)
    write_log(data, [line(time=T0 + 5_000_000, user=9, video=9, duration=0, like=1)], f"log_standard_4_22_to_5_08{ending}")
    write_log(data, [line(), line(user=3, video=5, time=T0 + 1)], f"log_standard_4_08_to_4_21{ending}")
    write_log(data, [line(user=77)], f"log_random_4_22_to_5_08{ending}")
    chunks = assert_resumes(source(tmp_path / "KuaiRand", features=True))
    first, second, third = rows_of(chunks)
    assert not any(chunk.rejected for chunk in chunks)
    assert {
        "user_id": 1,
        "video_id": 2,
        "event_time_ms": T0,
        "play_time_ms": 5000,
        "duration_ms": 9000,
    }.items() <= first.items()
    assert [first[name] for name in ("click", "like", "comment", "share", "dislike")] == [True, False, False, True, False]
    assert (first["user_active_degree"], first["user_follow_user_num"], first["user_onehot_feat4"]) == ("full_active", 7, 2)
    assert (first["author_id"], first["sound_id"], first["tag_id"], first["tab"]) == (20, 200, [12, 65], 3)
    # 2022-04-08 06:40 UTC is 14:40 in Beijing, 2 days and 14:40 hours after the start of 2022-04-06 there.
    assert first["hour_of_day"] == 14 and first["video_age_days"] == pytest.approx(2 + 14 / 24 + 40 / 1440)
    assert second["user_onehot_feat4"] is None and second["tag_id"] is None and second["video_age_days"] == 0
    assert third["duration_ms"] is None and third["author_id"] is None and third["user_active_degree"] is None and third["like"]
    assert not {"comment_stay_time", "profile_stay_time", "long_view", "date"} & set(first)
    for field in EXAMPLE:
        if field.name in first:
            assert chunks[0].examples.schema.field(field.name).type == field.type
    assert labels(chunks[-1].examples, ["like", "complete"])[1].tolist() == [[1, 0]]


def test_every_bad_row_is_set_aside_with_its_line(tmp_path: Path) -> None:
    rows = [line(user=i, time=T0 + i) for i in range(14)]
    bad = {
        2: (line(duration=-1), "negative duration"),
        3: (line(play=-5), "negative play time"),
        4: (line(time=T0 - 3_600_001), "time went backwards"),
        5: (rows[1], "duplicate"),
        6: (line(video=2**63), "video_id is out of range"),
        7: (line(user=""), "user_id is missing"),
        8: (line(play="abc"), "play_time_ms is not a whole number"),
        9: (line(time=12), "time out of range"),
        10: ("1,2,3", "not 19 fields"),
        11: (line(like=7), "is_like is not 0 or 1"),
        12: ("", "user_id is missing"),
    }
    for index, (text, _) in bad.items():
        rows[index] = text
    rows[13] = line(user=-(2**63), video=-1, time=T0 + 13)
    write_log(tmp_path, rows)
    chunks = assert_resumes(source(tmp_path))
    name = "log_standard_4_08_to_4_21_pure.csv"
    assert reasons_of(chunks) == {f"{name}:{index + 2}": reason for index, (_, reason) in bad.items()}
    assert [row["user_id"] for row in rows_of(chunks)] == [0, 1, -(2**63)]
    raws = {row.where.rpartition(":")[2]: row.raw for chunk in chunks for row in chunk.rejected}
    assert raws["4"] == bad[2][0] and raws["12"] == "1,2,3"


def test_part_and_epochs(tmp_path: Path) -> None:
    write_log(tmp_path, [line(user=i, time=T0 + i) for i in range(7)], "log_standard_a.csv")
    write_log(tmp_path, [line(user=i, time=T0 + i) for i in range(7, 12)], "log_standard_b.csv.gz")
    first, last = source(tmp_path, part=(0.0, 0.7), epochs=2), source(tmp_path, part=(0.7, 1.0))
    assert [row["user_id"] for row in rows_of(assert_resumes(first))] == [*range(8), *range(8)]
    assert [row["user_id"] for row in rows_of(assert_resumes(last))] == [8, 9, 10, 11]
    assert (first.num_examples, last.num_examples, source(tmp_path).num_examples) == (16, 4, None)


def test_a_log_by_user_is_refused_and_can_be_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_features(tmp_path)
    rows = [line(user=user, video=i, time=T0 + 10_000_000 * i + user) for user in range(30) for i in range(40)]
    path = write_log(tmp_path, rows)
    with pytest.raises(ValueError, match=r"not in time order.*python -m launch\.sort --input .*--time_column time_ms"):
        list(source(tmp_path, chunk_rows=100).read({}))
    target = tmp_path / "sorted"
    wanted = ["--input", str(path), "--output", str(target), "--time_column", "time_ms", "--rows_in_memory", "300"]
    assert sort.main(wanted) == 0
    assert "1,200 rows" in capsys.readouterr().out
    chunks = assert_resumes(source(target, features_folder=str(tmp_path), features=True, chunk_rows=256))
    times = [row["event_time_ms"] for row in rows_of(chunks)]
    assert times == sorted(times) and len(times) == 1200 and not counts_of(chunks)


def test_clear_errors_for_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        list(source(tmp_path / "none").read({}))
    with pytest.raises(ValueError, match="no log_standard"):
        list(source(tmp_path).read({}))
    path = write_log(tmp_path, [line()])
    with pytest.raises(ValueError, match="expected one file user_features"):
        list(source(tmp_path, features=True).read({}))
    write_log(tmp_path, [line()], "log_standard_4_08_to_4_21_pure.csv.gz")
    with pytest.raises(ValueError, match="two formats"):
        list(source(tmp_path).read({}))
    path.write_text(path.read_text().replace("is_like", "liked"))
    with pytest.raises(ValueError, match="no column 'is_like'; the file has: user_id"):
        list(source(tmp_path, logs=(path.name,)).read({}))
    with pytest.raises(ValueError, match="no such file"):
        list(source(tmp_path, logs=("log_random.csv",)).read({}))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        list(source(tmp_path, logs=(path.name,)).read({}))
    write_log(tmp_path, [line(play="long", user=i) for i in range(20)])
    with pytest.raises(
        ValueError, match=r"pure.csv: column 'play_time_ms' should hold whole numbers, got string such as 'long'"
    ):
        list(source(tmp_path, logs=(path.name,), chunk_rows=100).read({}))
    with pytest.raises(ValueError, match="part must be"):
        source(tmp_path, part=(0.5, 0.5))


def test_bad_features_are_refused_with_their_line(tmp_path: Path) -> None:
    write_log(tmp_path, [line()])
    write_features(tmp_path)
    videos = tmp_path / "video_features_basic_pure.csv"
    text = videos.read_text()
    videos.write_text(text.replace("2,20,", "2,x,"))
    with pytest.raises(ValueError, match=r"video_features_basic_pure.csv:3: author_id is not a whole number"):
        list(source(tmp_path, features=True).read({}))
    videos.write_text(text.replace("5,50,", "2,50,"))
    with pytest.raises(ValueError, match="video_id 2 has more than one row"):
        list(source(tmp_path, features=True).read({}))


def test_real_sample_is_read_and_accounted_for(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "kuairand27k_slice"
    whole = source(folder, features=True, chunk_rows=4096)
    chunks = list(whole.read({}))
    examples = pa.Table.from_batches([chunk.examples for chunk in chunks])
    assert examples.num_rows + sum(counts_of(chunks).values()) == 35_553
    assert counts_of(chunks) == {"duplicate": 92}
    assert examples.column("duration_ms").null_count > 6000
    assert examples.column("user_active_degree").null_count == 0
    assert 0 < examples.column("author_id").null_count < examples.num_rows
    again = list(whole.read(chunks[3].position))
    assert [chunk.examples for chunk in again] == [chunk.examples for chunk in chunks[4:]]
    log = pa_csv.read_csv(folder / "log_standard.csv.gz")
    pq.write_table(log, tmp_path / "log_standard.parquet")
    parquet = list(source(tmp_path, features_folder=str(folder), features=True, chunk_rows=4096).read({}))
    assert [chunk.examples for chunk in parquet] == [chunk.examples for chunk in chunks]
    assert counts_of(parquet) == {"duplicate": 92}
