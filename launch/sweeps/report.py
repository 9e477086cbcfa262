"""A sweep as one HTML file that needs nothing else: `report.html` (extra `report`).

In: the folder of a sweep, finished or not. Out: figures, tables, the exact command and configuration, versions, seeds. No
scripts, no fonts, no network; light and dark as the reader's system says.
"""

from __future__ import annotations

from html import escape
from itertools import takewhile
from pathlib import Path

from launch.sweeps.figures import MARKS, Figure, figures
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
.scroll { overflow: auto; max-height: 85vh; border: 1px solid var(--rule); border-radius: .6rem }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }
th { background: var(--card); font-weight: 600; position: sticky; top: 0 }
tr:last-child td { border-bottom: 0 }
.word { text-align: left }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere }
td.strong { font-weight: 700; color: var(--strong) }
figure { margin: 2rem 0 } figcaption { margin-bottom: .4rem } figcaption b { color: var(--ink); font-weight: 600 }
.wide { overflow-x: auto } svg { width: 100%; min-width: 34rem; max-width: 50rem; height: auto; display: block }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; max-width: 50rem; margin: .5rem 0 0; padding: 0;
  font-size: .9rem } .key li { overflow-wrap: anywhere } .key span { margin-right: .4rem }
svg text { font-family: inherit !important }
summary { cursor: pointer; margin: .8rem 0 }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .6rem } }
@media print { .scroll { max-height: none } main { max-width: none; padding: 0 } details > * { display: block } }
"""


def write_report(workdir: Path) -> Path:
    """Writes report.html; returns its path.

    Raises:
        ValueError: The folder holds no sweep.
        ImportError: matplotlib is not installed.
    """
    results = read_results(workdir)
    path = workdir / "report.html"
    path.write_text(page(results, figures(results), workdir), encoding="utf-8")
    return path


def page(results: Results, drawn: list[Figure], workdir: Path) -> str:
    """Returns the whole page; of the folder only configurations are read."""
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
        _configuration(results, workdir),
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
    def kind(row: int, place: int, text: str) -> str:
        is_word = place < grid.num_labels
        names = ["word"] * is_word + ["long"] * (is_word and len(text) > 32) + ["strong"] * ((row, place) in grid.strong)
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f'<th scope="col"{kind(-1, place, name)}>{escape(name)}</th>' for place, name in enumerate(grid.columns))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(row, place, text)}>{escape(text)}</td>" for place, text in enumerate(cells)) + "</tr>"
        for row, cells in enumerate(grid.rows)
    )
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    table = f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<section><h2>{escape(grid.title)}</h2>{table}{note}</section>"


def _figure(one: Figure) -> str:
    caption = f"<figcaption><b>{escape(one.title)}</b>{f'<br>{escape(one.note)}' if one.note else ''}</figcaption>"
    items = "".join(
        f'<li><span style="color:var(--series-{place})" aria-hidden="true">{mark}</span>{escape(name)}</li>'
        for place, (mark, name) in enumerate(zip(MARKS, one.series, strict=False), 1)
    )
    key = f'<ul class="key">{items}</ul>' if items else ""
    return f'<figure>{caption}<div class="wide" tabindex="0">{one.svg}</div>{key}</figure>'


def _configuration(results: Results, workdir: Path) -> str:
    first = results.plan["points"][0]
    bindings = "\n".join([*(f"include {path!r}" for path in first["gin_files"]), *first["bindings"], *first["overrides"]])
    texts = [(f"<code>{escape(path)}</code>", text) for path, text in results.plan["gin_files"].items()]
    texts.append(("the first point's experiment: files and bindings", bindings))
    kept = {
        "sweep.gin": "the sweep as it ran, defaults included",
        f"points/{first['key']}/config.gin": "the first point's experiment as it ran, defaults included",
    }
    for name, what in kept.items():
        if (workdir / name).is_file():
            texts.append((f"<code>{escape(name)}</code>: {what}", (workdir / name).read_text(encoding="utf-8")))
    files = "".join(f"<details><summary>{what}</summary><pre>{escape(text)}</pre></details>" for what, text in texts)
    return f"<section><h2>Configuration</h2>{files}</section>"
