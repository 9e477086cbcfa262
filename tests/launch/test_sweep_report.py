"""Tables and report of a sweep made by hand: what they say, what they leave out, and that the page needs nothing else."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch.sweeps.report import write_report
from launch.sweeps.results import all_grids, number, read_results
from launch.sweeps.tables import write_tables
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
        ("md5 <&\"'> | 10^6", "1", "-0.1000"),
        ("md5 <&\"'> | 10^6", "2", "-0.1000"),
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
    text = (workdir / "results.md").read_text(encoding="utf-8")
    assert "md5 &lt;&\"'> \\| 10^6" in text and "**0.7150 ± 0.0071 (2)**" in text and "held &lt;9> GB" in text
    lines = text.split("## Figures")[1].split("##")[0].splitlines()
    widths = {line.replace("\\|", "").count("|") for line in lines if "|" in line}
    assert widths == {6}


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


def test_numbers_have_as_many_digits_as_help() -> None:
    shown = [number(value) for value in (0.51234, 12.345, 1234.5, 1_000_000.0, 3.0, math.nan, -0.00012)]
    assert number(0.0, whole=True) == "0"
    assert shown == ["0.5123", "12.35", "1,234", "1,000,000", "3.0000", "-", "-0.0001"]
