"""A sweep's figures as inline SVG: dots with intervals, and curves with bands (extra `report`).

In: `Results`. Out: SVG as text that takes the colours and the fonts of the page around it: words are `currentColor`, series the
CSS variables `--series-1` and on, and nothing is loaded. Every id is the figure's own, so that many stand in one page.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from launch.sweeps.results import Column, Results, curves
from monolith_jax.evaluate.spread import Spread, spread

SERIES = 8
"""Colours of series; a figure has no more of them."""
MARKS = "●■▲◆▼✚✖★"
"""Of series, which differ in shape too: not everyone tells colours apart."""
_MARKERS = "os^DvPX*"
_INK, _GRID = "#0a0b0c", "#0a0b0d"
_MOST_DOTS = 40
_LINE, _LABEL = 36, 48


class Figure(NamedTuple):
    """One figure."""

    title: str
    svg: str
    series: tuple[str, ...] = ()
    """Names of the curves, in the order of colours and marks."""
    note: str = ""


class _Curve(NamedTuple):
    labels: tuple[str, ...]
    at: list[float]
    spreads: list[Spread]


def figures(results: Results) -> list[Figure]:
    """Returns the figures of a sweep: one for each figure that its tables show and that has values to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    _pyplot()
    out: list[Figure] = []
    for column in results.columns():
        if len(results.combinations) > 1:
            out += _dots(results, column, len(out))
    for along, column, places in curves(results):
        if len(places) > 1:
            out += _of_curves(results, column, along, places, len(out))
    return out


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'monolith_jax[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _colour(place: int) -> str:
    return f"#0a0c{place % SERIES:02x}"


def _style() -> dict[str, Any]:
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inks, _INK),
        "svg.fonttype": "none",
        "font.size": 10,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }


def _plain(text: str) -> str:
    """Returns text that matplotlib draws as it stands: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _name(results: Results, labels: Sequence[str]) -> str:
    """Returns labels as words; the axes' names help only where there are several. Of a long label both ends stay."""
    short = [label if len(label) <= _LABEL else f"{label[: _LABEL - 17]}…{label[-16:]}" for label in labels]
    parts = short if len(short) == 1 else [f"{axis} {label}" for axis, label in zip(results.axes, short, strict=True)]
    return ", ".join(parts) or results.plan["name"]


def _bounds(spreads: Iterable[Spread], values: Iterable[float] = ()) -> tuple[float, float, bool] | None:
    """Returns limits that show all means and values, and whether intervals are cut; None: no mean is finite.

    The wide intervals of two or three seeds would flatten all that is to be seen.
    """
    known = [one for one in spreads if math.isfinite(one.mean)]
    if not known:
        return None
    shown = [*(one.mean for one in known), *filter(math.isfinite, values)]
    low, high = min(shown), max(shown)
    ends = [end for one in known for end in (one.low, one.high) if math.isfinite(end)]
    typical = sorted(one.high - one.low for one in known if math.isfinite(one.low))
    room = max(high - low, typical[len(typical) // 2] if typical else 0)
    least, most = min(ends, default=low), max(ends, default=high)
    below, above = min(max(least, low - room), low), max(min(most, high + room), high)
    flat = above - below <= 1e-9 * max(abs(low), abs(high))
    margin = (1e-3 * max(abs(low), abs(high)) or 1.0) if flat else 0.05 * (above - below)
    return below - margin, above + margin, least < below - margin or most > above + margin


def _ticks(axis: Any, whole: bool = False) -> None:
    """Writes few numbers at an axis, each in full: an offset would stand over the axis' title."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole))
    places = axis.get_majorticklocs()
    size, step = float(max(abs(places))), float(places[1] - places[0]) if len(places) > 1 else 1.0
    if size >= 1e9 or 0 < size < 1e-3:
        digits = max(math.floor(math.log10(size)) - math.floor(math.log10(step) + 1e-9), 0)
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value, digits)))
    elif size >= 1000 and step >= 1:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    else:
        axis.set_major_formatter(ScalarFormatter(useOffset=False))


def _short(value: float, digits: int) -> str:
    return (
        "0"
        if value == 0
        else re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", f"{value:.{digits}e}")
    )


def _dots(results: Results, column: Column, number: int) -> list[Figure]:
    """Draws means with their intervals, a line for each combination."""
    pyplot, combinations, base = _pyplot(), results.combinations[:_MOST_DOTS], results.baseline
    values = [list(results.by_seed(labels, column).values()) for labels in combinations]
    spreads = [spread(of_row) for of_row in values]
    bounds = _bounds(spreads, itertools.chain(*values))
    if bounds is None:
        return []
    title = f"{column.title}: mean and 95 % interval over seeds"
    names = [textwrap.wrap(_name(results, labels), _LINE) for labels in combinations]
    height = 0.9 + len(names) * (0.17 + 0.17 * max(map(len, names)))
    with pyplot.rc_context(_style() | {"svg.hashsalt": f"dots {number}"}):
        figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
        for row, (labels, of_row, one) in enumerate(zip(combinations, values, spreads, strict=True)):
            is_base = base is not None and labels[results.axes.index(base[0])] == base[1]
            colour = _colour(1 if is_base else 0)
            if not math.isnan(one.low):
                axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2, solid_capstyle="round", alpha=0.55)
            axes.plot(of_row, [row] * len(of_row), "|", color=colour, markersize=7, markeredgewidth=1, alpha=0.8)
            axes.plot([one.mean], [row], marker="D" if is_base else "o", color=colour, markersize=6)
        axes.set_yticks(range(len(names)), [_plain("\n".join(lines)) for lines in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(bounds[0], bounds[1])
        _ticks(axes.xaxis)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(_plain(column.title))
        drawn = _svg(figure, number, title)
    notes = ["Small strokes: the seeds."]
    notes += [f"Diamond: {base[0]} {base[1]}, the baseline."] if base else []
    if (total := len(results.combinations)) > _MOST_DOTS:
        notes.append(f"The first {_MOST_DOTS} of {total} combinations.")
    return [Figure(title, drawn, note=" ".join([*notes, *_cut(bounds)]))]


def _cut(bounds: tuple[float, float, bool]) -> list[str]:
    return ["Intervals that reach the edge go on beyond it."] if bounds[2] else []


def _of_curves(results: Results, column: Column, along: str, places: Sequence[float], number: int) -> list[Figure]:
    """Draws curves with bands; of more combinations than colours, one figure for each label of the first axis."""
    known = []
    for labels in results.combinations:
        spreads = [(at, spread(list(results.by_seed(labels, column, along, at).values()))) for at in places]
        there = [(at, one) for at, one in spreads if math.isfinite(one.mean)]
        known.append(_Curve(labels, [at for at, _ in there], [one for _, one in there]))
    bounds = _bounds(one for curve in known for one in curve.spreads)
    if bounds is None:
        return []
    whole = len(known) <= SERIES or len(results.axes) == 1
    out: list[Figure] = []
    for group in [""] if whole else list(dict.fromkeys(curve.labels[0] for curve in known)):
        within = [curve for curve in known if whole or curve.labels[0] == group]
        for start in range(0, len(within), SERIES):
            more = "" if whole else f", {results.axes[0]} {group}"
            part = f" ({start // SERIES + 1} of {-(-len(within) // SERIES)})" if len(within) > SERIES else ""
            title = f"{column.title} by {along}{more}{part}: mean and 95 % interval over seeds"
            chosen = within[start : start + SERIES]
            drawn = _curves(chosen, column, along, bounds, number + len(out), title)
            out.append(Figure(title, drawn, tuple(_name(results, one.labels) for one in chosen), " ".join(_cut(bounds))))
    return out


def _curves(
    known: Sequence[_Curve], column: Column, along: str, bounds: tuple[float, float, bool], number: int, title: str
) -> str:
    """Draws curves into limits that all figures of a column share."""
    pyplot = _pyplot()
    with pyplot.rc_context(_style() | {"svg.hashsalt": f"curves {number}"}):
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for place, (_, at, spreads) in enumerate(known):
            means = [one.mean for one in spreads]
            low = [one.mean if math.isnan(one.low) else one.low for one in spreads]
            high = [one.mean if math.isnan(one.high) else one.high for one in spreads]
            colour = _colour(place)
            axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
            every = max(len(at) // 10, 1)
            marks = (place * every // SERIES, every) if every > 1 else 1
            axes.plot(at, means, color=colour, linewidth=1.8, marker=_MARKERS[place], markersize=5, markevery=marks)
        axes.set_ylim(bounds[0], bounds[1])
        _ticks(axes.xaxis, whole=all(at == round(at) for curve in known for at in curve.at))
        _ticks(axes.yaxis)
        axes.grid(axis="y")
        axes.set_xlabel(_plain(along))
        axes.set_ylabel(_plain(column.title))
        return _svg(figure, number, title)


def _tag(tag: str, number: int) -> str:
    """Returns a tag with ids of its own and the page's colours; the words between tags are left as they are."""
    tag = re.sub(r'(?<=\s)id="([^"]+)"', rf'id="f{number}-\1"', tag)
    tag = re.sub(r'(xlink:href="#|href="#|url\(#)', rf"\g<1>f{number}-", tag)
    tag = tag.replace("xlink:href", "href").replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for place in range(SERIES):
        tag = tag.replace(_colour(place), f"var(--series-{place + 1})")
    # A hundredth of a point is finer than a screen.
    return re.sub(r'(?<=\s)(?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), tag)


def _svg(figure: Any, number: int, title: str) -> str:
    """Returns a drawn figure as SVG to stand in a page."""
    from html import escape

    from matplotlib import pyplot

    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    pyplot.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda found: _tag(found[0], number), text)
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    view = re.search(r'viewBox="[^"]+"', opening[0])
    assert view is not None
    head = f'<svg {view[0]} role="img" aria-label="{escape(title, quote=True)}">'
    return f"{head}<title>{escape(title)}</title>{text[opening.end() :]}"
