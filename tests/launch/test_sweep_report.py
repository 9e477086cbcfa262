"""Tables and report of a sweep made by hand: what they say, what they leave out, and that the page needs nothing else."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.sweeps.figures import figures
from launch.sweeps.report import page, write_report
from launch.sweeps.results import all_grids, cell, difference, facts, number, read_results, unknown_names
from launch.sweeps.tables import markdown, write_tables
from monolith_jax.evaluate.spread import spread
from tests.launch.small_sweep import write_result, write_results

AXES = {"rows": ["own", "md5 <&\"'> | 10^6"], "size": ["1", "2"]}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Two axes, three seeds, two heads, a curve; one point failed, one is missing, one has a value that is no number."""
    points = write_results(tmp_path, AXES, [0, 1, 2], baseline="rows=own", metrics=["auc", "rows", "log_loss"])
    for point in points[:-2]:
        seed, shift = point["seed"], 0.1 * (point["labels"]["rows"] == "own")
        curve = [("auc", 0.5 + shift + at / 100 + seed / 1000, "mean", "epoch", at) for at in (1, 2, 3)]
        auc = None if point["index"] == 1 else 0.6 + shift + seed / 100
        rows = [("auc", auc, "mean"), ("auc", 0.9, "like"), ("rows", 1234567 + seed), ("log_loss", 0.5 - shift)]
        write_result(tmp_path, point, *rows, *curve)
    failed = tmp_path / "points" / points[-1]["key"]
    failed.mkdir(parents=True)
    (failed / "failed.json").write_text('{"reason": "held <9> GB", "traceback": []}')
    return tmp_path


def test_tables_say_what_was_measured(workdir: Path) -> None:
    main, compared, curve, missing = all_grids(read_results(workdir))
    assert main.columns == ("rows", "size", "auc, mean", "rows", "log_loss")
    assert main.rows[0] == ("own", "1", "0.7100 ± 0.0100", "1,234,568 ± 1", "0.4000")
    assert main.rows[1][2] == "0.7150 ± 0.0071 (2)", "one of three is no number, and is told"
    assert main.rows[2][2] == "0.6050 ± 0.0071 (2)", "one of three has failed"
    assert (1, 2) in main.strong and (0, 4) in main.strong, "the highest AUC and the lowest loss"
    assert [row[:3] for row in compared.rows] == [
        ("md5 <&\"'> | 10^6", "1", "-0.1000 (2)"),
        ("md5 <&\"'> | 10^6", "2", "-0.1000 (1)"),
    ]
    assert curve.title == "auc, mean, by epoch" and curve.columns[2:] == ("epoch 1", "epoch 2", "epoch 3")
    assert [row[2:] for row in missing.rows] == [("2", "missing", ""), ("2", "failed", "held <9> GB")]


def test_files_hold_every_number(workdir: Path) -> None:
    tables = write_tables(workdir)
    assert [str(table.title) for table in tables][:2] == ["Figures", "Against rows own"]
    rows = pq.read_table(workdir / "results.parquet").to_pylist()
    assert len(rows) == 10 * 7 and {row["along"] for row in rows} == {"", "epoch"}
    assert [row["at"] for row in rows if row["point"] == 0] == [None] * 4 + [1.0, 2.0, 3.0]
    assert sum(math.isnan(row["value"]) for row in rows) == 1
    points = pq.read_table(workdir / "points.parquet").to_pylist()
    assert [row["status"] for row in points] == ["finished"] * 10 + ["missing", "failed"]
    finished = read_results(workdir).plan["points"][:10]
    written = [row for point in finished for row in written_rows(workdir, point)]
    names = ("metric", "head", "along", "at", "value")
    assert [[None if row[name] != row[name] else row[name] for name in names] for row in rows] == written
    text = (workdir / "results.md").read_text(encoding="utf-8")
    assert "md5 &lt;&\"'> \\| 10^6" in text and "**0.7150 ± 0.0071 (2)**" in text and "held &lt;9> GB" in text
    lines = text.split("## Figures")[1].split("##")[0].splitlines()
    widths = {line.replace("\\|", "").count("|") for line in lines if "|" in line}
    assert widths == {6}


def written_rows(workdir: Path, point: dict[str, Any]) -> list[list[Any]]:
    result = json.loads((workdir / "points" / point["key"] / "result.json").read_text(encoding="utf-8"))
    return [[row[name] for name in ("metric", "head", "along", "at", "value")] for row in result["rows"]]


class Page(HTMLParser):
    """Collects ids, what is referred to, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.loads += [given[name] or "" for name in ("src", "href", "xlink:href", "data") if name in given]
        if tag not in ("meta", "path", "use", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "path", "use", "rect", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_needs_nothing_else(workdir: Path) -> None:
    text = write_report(workdir).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(set(page.ids)) == len(page.ids) > 10
    assert all(one.startswith("#") and one[1:] in page.ids for one in page.loads)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe|<img", text)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert len(text) < 1_000_000 and "prefers-color-scheme: dark" in text
    assert not re.search(r"#0a0[bc]", text), "all colours of the figures are the page's"
    said = " ".join(page.words)
    for wanted in ("by <hand> & co", "python -m launch.sweep --x='<1>'", "What & why", "A.b = '<'", "held <9> GB", "a <cpu>"):
        assert wanted in said
    assert text.count("<figure>") == text.count("<svg") == 4
    assert text.count('role="img" aria-label="') == 4


def test_no_axes_one_seed_and_nothing_finished(tmp_path: Path) -> None:
    (point,) = write_results(tmp_path / "one", {}, [7])
    write_result(tmp_path / "one", point, ("rows", 5.0), ("auc", 0.5))
    write_tables(tmp_path / "one")
    assert all_grids(read_results(tmp_path / "one"))[0].rows == (("0.5000",),)
    assert "<svg" not in write_report(tmp_path / "one").read_text(encoding="utf-8")
    write_results(tmp_path / "none", AXES, [0])
    write_tables(tmp_path / "none")
    assert write_report(tmp_path / "none").is_file()
    with pytest.raises(ValueError, match=r"holds no sweep\.json"):
        read_results(tmp_path)


def test_more_curves_than_colours_are_parted(tmp_path: Path) -> None:
    axes = {"a": ["x", "y"], "b": [f"$b_{one}$" for one in range(9)]}
    for point in write_results(tmp_path, axes, [0]):
        write_result(tmp_path, point, *(("auc", 0.5 + at, "", "hour", at) for at in range(40)))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert text.count("<figure>") == 4 and "auc by hour, a x" in text and "$b_3$" in text
    (grid,) = [grid for grid in all_grids(read_results(tmp_path)) if "by hour" in grid.title]
    assert len(grid.columns) == 2 + 12 and grid.columns[2] == "hour 0" and grid.columns[-1] == "hour 39"


def test_words_in_figures_stay_as_they_are(tmp_path: Path) -> None:
    odd = ["#0a0b0c 0.123456", '_a id="x" d="1.23456"', "url(#y) href", "a" * 60 + " one", "a" * 60 + " two"]
    for point in write_results(tmp_path, {"a": odd}, [0, 1], metrics=["m_$b$"]):
        curve = (("m_$b$", float(at), "$h$", "$e$", at) for at in (1, 2))
        write_result(tmp_path, point, ("m_$b$", 0.6025 + 0.0025 * (point["index"] % 5), "$h$"), *curve)
    dots, lines = figures(read_results(tmp_path))
    words = "".join(Page("<svg>" + dots.svg.partition("</title>")[2]).words)
    assert all(wanted in words for wanted in (*odd[:3], "m_$b$, $h$")), words
    ticks = re.findall(r">([\d.]+)</text>", dots.svg)
    assert len(set(ticks)) == len(ticks) > 3 and all(float(tick) > 0.6 for tick in ticks), "no digit is cut off"
    assert lines.series[:3] == tuple(odd[:3]) and len(set(lines.series)) == 5
    said = "".join(Page(write_report(tmp_path).read_text(encoding="utf-8")).words)
    assert all(name in said for name in lines.series)


def test_what_is_no_number_is_shown_and_never_the_best(tmp_path: Path) -> None:
    for point in write_results(
        tmp_path, {"rate": ["low", "high"]}, [0, 1], metrics=["loss", "auc", "bad", "calibration", "gain"]
    ):
        loss = math.inf if point["labels"]["rate"] == "high" else 0.5
        others = ("auc", 0.5 + point["index"]), ("calibration", 1.0 + 0.5 * (loss > 1)), ("gain", 2 * loss)
        write_result(tmp_path, point, ("loss", loss), ("bad", None), *others, *(("bad", None, "", "hour", at) for at in (1, 2)))
    grid, *_ = all_grids(read_results(tmp_path))
    assert [row[1] for row in grid.rows] == ["0.5000", "inf"] and [row[3] for row in grid.rows] == ["-", "-"]
    assert grid.strong == {(0, 1), (1, 2), (0, 4), (0, 5)}
    write_tables(tmp_path)
    assert [one.title.partition(":")[0] for one in figures(read_results(tmp_path))] == ["loss", "auc", "calibration", "gain"]


def test_figures_of_one_kind_share_their_limits(tmp_path: Path) -> None:
    axes = {"a": ["x", "y"], "b": [str(one) for one in range(5)]}
    for point in write_results(tmp_path, axes, [0]):
        shift = 100.0 if point["labels"]["a"] == "y" else 0.0
        write_result(tmp_path, point, *(("m", shift + at, "", "hour", at) for at in range(3)))
    first, second = (re.findall(r">([\d,]+)</text>", one.svg) for one in figures(read_results(tmp_path)))
    assert first == second and "100" in first


def test_a_cut_interval_is_told_of(tmp_path: Path) -> None:
    for point in write_results(tmp_path, {"a": ["x", "y", "z"]}, [0, 1], metrics=["m"]):
        write_result(tmp_path, point, ("m", point["index"] % 3 + point["seed"] * (1.0 if point["index"] % 3 == 1 else 0.001)))
    (figure,) = figures(read_results(tmp_path))
    assert "go on beyond it" in figure.note and "1 failed" not in dict(facts(read_results(tmp_path)))["points"]


def test_the_page_holds_the_exact_configuration(workdir: Path) -> None:
    (workdir / "sweep.gin").write_text("Sweep.name = '<&>'")
    (workdir / "points" / "0000" / "config.gin").write_text("TrainConfig.steps = 7  # </pre>")
    said = Page(write_report(workdir).read_text(encoding="utf-8")).words
    assert "Sweep.name = '<&>'" in said and "TrainConfig.steps = 7  # </pre>" in said
    assert "10 of 12 finished, 1 failed, 1 missing; 20 s in all, the longest 2 s" in said


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=30), min_size=1, max_size=3, unique=True))
def test_any_label_comes_through(tmp_path_factory: pytest.TempPathFactory, labels: list[str]) -> None:
    folder = tmp_path_factory.mktemp("labels")
    for point in write_results(folder, {"<axis>": labels}, [0]):
        write_result(folder, point, ("auc", 0.5))
    results = read_results(folder)
    said = Page(page(results, [], folder)).words
    assert said.count("<axis>") >= 1 and all(label in said for label in labels)
    table = markdown(results, all_grids(results)).split("## Figures")[1]
    bars = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines() if line.startswith("|")}
    assert bars == {3}


def test_markdown_shows_labels_as_they_are(tmp_path: Path) -> None:
    for point in write_results(tmp_path, {"test_auc": ["a&lt;b & c", "\\|", "*x* _y_ `z`", "[a](b) <br>"]}, [0]):
        write_result(tmp_path, point, ("auc", 0.5))
    write_tables(tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    wanted = ("a&amp;lt;b & c", r"\\\|", r"\*x\* \_y\_ \`z\`", r"\[a](b) &lt;br>")
    assert [line.split(" | ")[0][2:] for line in text.splitlines() if line.endswith("| 0.5000 |")] == list(wanted)
    assert "| test_auc | auc |" in text


def test_numbers_have_as_many_digits_as_help() -> None:
    shown = [number(value) for value in (0.51234, 12.345, 1234.5, 1_000_000.0, 3.0, math.nan, -0.00012)]
    assert shown == ["0.5123", "12.35", "1,234", "1,000,000", "3.0000", "-", "-1.2e-04"]
    assert [number(value) for value in (0.0, -0.0, math.inf, -math.inf)] == ["0", "0", "inf", "-inf"]
    assert cell(spread([2e-5, 4e-5, 6e-5]), 3) == "4.0e-05 ± 2.0e-05"
    assert cell(spread([0.5, 0.50001, 0.50002]), 3) == "0.5000 ± 1.0e-05", "a spread never looks like none"
    assert difference(spread([-10.0, 10.00002]), 2) == "+0.00 (-127.06 to 127.06)"
    assert difference(spread([-1.0, -1.0]), 2) == "-1.0000" and difference(spread([math.nan]), 1) == "-"


def test_versions_of_the_points_are_told_not_those_of_the_last_call(tmp_path: Path) -> None:
    points = write_results(tmp_path, {}, [0, 1, 2], metrics=["auc", "acu"])
    for point, version in zip(points, ("1", "1", "2"), strict=True):
        write_result(tmp_path, point, ("auc", 0.5))
        path = tmp_path / "points" / point["key"] / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {"jax": version}}))
    results = read_results(tmp_path)
    assert facts(results)[-2:] == [("versions of 2 points", "jax 1"), ("versions of 1 points", "jax 2")]
    assert unknown_names(results) == ["Sweep.metrics: acu"]
