"""A sweep as one HTML file that needs nothing else: `report.html` (extra `report`).

In: the folder of a sweep, finished or not. Out: figures, tables, the exact command and configuration, versions, seeds. No
scripts, no fonts, no network; light and dark as the reader's system says.
"""

from __future__ import annotations

from html import escape
from itertools import takewhile
from pathlib import Path

from launch.sweeps.figures import Figure, figures
from launch.sweeps.results import Grid, Results, all_grids, facts, read_results

_LIGHT = ("#0b62a4", "#c2410c", "#15803d", "#7c3aed", "#b4236c", "#0e7490", "#8a6100", "#475569")
_DARK = ("#6cb6f5", "#fb9a5b", "#6bd08c", "#b79cf7", "#f58ab8", "#5cd0e0", "#e0b84c", "#a9b6c7")
"""Series, apart in hue and in lightness from the page."""

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #59636e; --page: #ffffff; --card: #f6f8fa; --rule: #d8dee4;
  --grid: #e3e7eb; --strong: #0b62a4; SERIES_LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9aa5b1; --page: #0f1318; --card: #171c23;
  --rule: #2d353f; --grid: #29313a; --strong: #6cb6f5; SERIES_DARK } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
p { max-width: 44rem }
p.note, figcaption { color: var(--quiet); font-size: .9rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; background: var(--card);
  border: 1px solid var(--rule); border-radius: .6rem; padding: 1rem 1.2rem; font-size: .92rem; margin: 1.4rem 0 }
dt { color: var(--quiet) } dd { margin: 0; overflow-wrap: anywhere }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .87em }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: 1rem; overflow-x: auto }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: .6rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }
th { background: var(--card); font-weight: 600 }
tr:last-child td { border-bottom: 0 }
.word { text-align: left }
td.strong { font-weight: 700; color: var(--strong) }
figure { margin: 1.6rem 0 } figcaption { margin-bottom: .4rem }
svg { width: 100%; max-width: 50rem; height: auto; display: block }
svg text { font-family: inherit !important }
summary { cursor: pointer; margin: .8rem 0 }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .6rem } }
@media print { main { max-width: none; padding: 0 } details > * { display: block } }
"""


def write_report(workdir: Path) -> Path:
    """Writes report.html; returns its path.

    Raises:
        ValueError: The folder holds no sweep.
        ImportError: matplotlib is not installed.
    """
    results = read_results(workdir)
    path = workdir / "report.html"
    path.write_text(page(results, figures(results)), encoding="utf-8")
    return path


def page(results: Results, drawn: list[Figure]) -> str:
    """Returns the whole page."""
    name = results.plan["name"]
    first, *others = all_grids(results)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)}</title><style>{_css()}</style></head><body><main>",
        f"<h1>{escape(name)}</h1>",
        f"<p>{escape(_opening(results))}</p>",
        _facts(results),
        _table(first),
        *(_figure(one) for one in drawn),
        *(_table(grid) for grid in others),
        _configuration(results),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _css() -> str:
    def series(colours: tuple[str, ...]) -> str:
        return " ".join(f"--series-{place}: {colour};" for place, colour in enumerate(colours, 1))

    return _CSS.replace("SERIES_LIGHT", series(_LIGHT)).replace("SERIES_DARK", series(_DARK))


def _opening(results: Results) -> str:
    """Returns the first paragraph of the gin file's first comment: what it says of itself."""
    lines = next(iter(results.plan["gin_files"].values()), "").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: len(line) > 1 and line[0] == "#", lines))


def _facts(results: Results) -> str:
    rows = []
    for name, text in facts(results):
        shown = f"<code>{escape(text)}</code>" if name == "command" else escape(text)
        rows.append(f"<dt>{escape(name)}</dt><dd>{shown}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _table(grid: Grid) -> str:
    def kind(row: int, place: int) -> str:
        names = ["word"] * (place < grid.num_labels) + ["strong"] * ((row, place) in grid.strong)
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f'<th scope="col"{kind(-1, place)}>{escape(name)}</th>' for place, name in enumerate(grid.columns))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(row, place)}>{escape(text)}</td>" for place, text in enumerate(cells)) + "</tr>"
        for row, cells in enumerate(grid.rows)
    )
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<section><h2>{escape(grid.title)}</h2>{table}{note}</section>"


def _figure(one: Figure) -> str:
    return f"<figure><figcaption>{escape(one.title)}</figcaption>{one.svg}</figure>"


def _configuration(results: Results) -> str:
    files = "".join(
        f"<details><summary><code>{escape(path)}</code></summary><pre>{escape(text)}</pre></details>"
        for path, text in results.plan["gin_files"].items()
    )
    first = results.plan["points"][0]
    bindings = "\n".join([*(f"include {path!r}" for path in first["gin_files"]), *first["bindings"], *first["overrides"]])
    of_point = f"<details><summary>the first point's experiment</summary><pre>{escape(bindings)}</pre></details>"
    return f"<section><h2>Configuration</h2>{files}{of_point}</section>"
