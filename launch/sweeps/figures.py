"""A sweep's figures as inline SVG: dots with intervals, and curves with bands (extra `report`).

In: `Results`. Out: SVG as text that takes the colours and the fonts of the page around it: words are `currentColor`, series the
CSS variables `--series-1` and on, and nothing is loaded. Every id is the figure's own, so that many stand in one page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from launch.sweeps.results import Column, Results, curves
from monolith_jax.evaluate.spread import spread

SERIES = 8
"""Colours of series; a figure has no more of them."""
_INK, _GRID = "#0a0b0c", "#0a0b0d"
_MOST_DOTS = 40


class Figure(NamedTuple):
    """One figure."""

    title: str
    svg: str


def figures(results: Results) -> list[Figure]:
    """Returns the figures of a sweep: one for each figure that its tables show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    out: list[Figure] = []
    for column in results.columns():
        if len(results.combinations) > 1:
            out.append(_dots(results, column, len(out)))
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
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }


def _dots(results: Results, column: Column, number: int) -> Figure:
    """Draws means with their intervals, a line for each combination."""
    pyplot, combinations = _pyplot(), results.combinations[:_MOST_DOTS]
    spreads = [spread(list(results.by_seed(labels, column).values())) for labels in combinations]
    title = f"{column.title}: mean and 95 % interval over seeds"
    if len(results.combinations) > _MOST_DOTS:
        title += f" (the first {_MOST_DOTS} of {len(results.combinations)} combinations)"
    with pyplot.rc_context(_style() | {"svg.hashsalt": f"dots {number}"}):
        figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.34 * len(combinations)), layout="constrained")
        base = results.baseline
        for row, (labels, one) in enumerate(zip(combinations, spreads, strict=True)):
            is_base = base is not None and labels[results.axes.index(base[0])] == base[1]
            colour = _colour(1 if is_base else 0)
            if not math.isnan(one.low):
                axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2, solid_capstyle="round", alpha=0.55)
            for value in results.by_seed(labels, column).values():
                axes.plot(value, row, marker="|", color=colour, markersize=7, markeredgewidth=1, alpha=0.8)
            axes.plot(one.mean, row, marker="D" if is_base else "o", color=colour, markersize=6)
        axes.set_yticks(range(len(combinations)), [_name(results, labels) for labels in combinations])
        axes.set_ylim(len(combinations) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(column.title + (f"  (diamond: {base[0]} {base[1]}, the baseline)" if base else ""))
        axes.margins(x=0.06)
        if axes.get_xlim()[1] > 1000:
            axes.xaxis.set_major_formatter("{x:,.0f}")
        return Figure(title, _svg(figure, number, title))


def _name(results: Results, labels: Sequence[str]) -> str:
    """Returns labels as words; the axes' names help only where there are several."""
    parts = labels if len(labels) == 1 else [f"{axis} {label}" for axis, label in zip(results.axes, labels, strict=True)]
    text = ", ".join(parts) or results.plan["name"]
    # A dollar sign would begin a formula.
    return (text if len(text) <= 60 else text[:59] + "…").replace("$", r"\$")


def _of_curves(results: Results, column: Column, along: str, places: Sequence[float], number: int) -> list[Figure]:
    """Draws curves with bands; of more combinations than colours, one figure for each label of the first axis."""
    combinations, out = results.combinations, []
    whole = len(combinations) <= SERIES
    groups = [""] if whole else list(dict.fromkeys(labels[0] for labels in combinations))
    for group in groups:
        within = [labels for labels in combinations if whole or labels[0] == group]
        for start in range(0, len(within), SERIES):
            more = "" if whole else f", {results.axes[0]} {group}"
            title = f"{column.title} by {along}{more}: mean and 95 % interval over seeds"
            chosen = within[start : start + SERIES]
            out.append(_curves(results, column, along, places, number + len(out), title, chosen))
    return out


def _curves(
    results: Results,
    column: Column,
    along: str,
    places: Sequence[float],
    number: int,
    title: str,
    combinations: Sequence[tuple[str, ...]],
) -> Figure:
    pyplot = _pyplot()
    from matplotlib.ticker import MaxNLocator

    with pyplot.rc_context(_style() | {"svg.hashsalt": f"curves {number}"}):
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for place, labels in enumerate(combinations):
            spreads = [spread(list(results.by_seed(labels, column, along, at).values())) for at in places]
            known = [(at, one) for at, one in zip(places, spreads, strict=True) if one.number]
            if not known:
                continue
            x, means = [at for at, _ in known], [one.mean for _, one in known]
            low = [one.mean if math.isnan(one.low) else one.low for _, one in known]
            high = [one.mean if math.isnan(one.high) else one.high for _, one in known]
            axes.fill_between(x, low, high, color=_colour(place), alpha=0.15, linewidth=0)
            mark = "o" if len(x) <= 20 else ""
            name = _name(results, labels)
            axes.plot(x, means, color=_colour(place), linewidth=1.8, marker=mark, markersize=4, label=name)
        axes.set_ylim(*_limits(axes))
        axes.xaxis.set_major_locator(MaxNLocator(integer=all(at == round(at) for at in places)))
        axes.grid(axis="y")
        axes.set_xlabel(along)
        axes.set_ylabel(column.title)
        if len(combinations) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2 if len(combinations) > 3 else len(combinations))
        return Figure(title, _svg(figure, number, title))


def _limits(axes: Any) -> tuple[float, float]:
    """Returns limits that show the lines: wide bands of few seeds, which would flatten them, are cut off."""
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.zeros(1)]).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    room = max(high - low, 1e-3 * max(abs(high), 1e-3))
    least, most = axes.get_ylim()
    return max(least, low - 0.6 * room), min(most, high + 0.6 * room)


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
    text = re.sub(r'\bid="([^"]+)"', rf'id="f{number}-\1"', text)
    text = re.sub(r'(xlink:href="#|href="#|url\(#)', rf"\g<1>f{number}-", text)
    text = text.replace("xlink:href", "href").replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for place in range(SERIES):
        text = text.replace(_colour(place), f"var(--series-{place + 1})")
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    view = re.search(r'viewBox="[^"]+"', opening[0])
    assert view is not None
    head = f'<svg {view[0]} role="img" aria-label="{escape(title, quote=True)}">'
    return head + text[opening.end() :]
