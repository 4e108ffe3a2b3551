"""Forest plots: mean differences with their intervals and every value behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from topkd.reporting.plots.interactive import Chart
from topkd.reporting.plots.style import BASELINE, COLORS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 3.9  # inches: fits a phone without being scaled down
ROW = 0.4  # inches
MARGIN = "#eef2ee"  # color of the band
REACH = 2.5  # an interval is drawn up to this multiple of the largest difference
LETTERS = 8.5  # points


@dataclass(frozen=True)
class Difference:
    """A row of a forest plot."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    values: Mapping[str, float]
    """Name of each single value, such as ``seed 3`` -> difference."""
    verdict: str


def forest(
    rows: Sequence[Difference],
    *,
    title: str,
    xlabel: str,
    digits: int = 2,
    margin: float | None = None,
    colors: Mapping[str, str] | None = None,
) -> Chart:
    """Plots mean differences with their intervals, all single values as dots, and a line at zero.

    Args:
        rows: The differences, from top to bottom.
        title: Title of the figure.
        xlabel: Label of the x axis, with unit.
        digits: Number of decimals of hover values.
        margin: Half width of the shaded band around zero.
        colors: Name -> color of a row.
    """
    ends = _ends(rows, margin)
    with styled():
        figure = new_figure(WIDTH, ROW * len(rows) + 0.75)
        axes = figure.add_subplot()
        axes.set_xlabel(xlabel, fontsize=LETTERS)
        axes.set_title(title, fontsize=9.5, wrap=True)
        axes.set(xlim=ends, ylim=(len(rows) - 0.4, -0.75), yticks=[])
        if margin is not None:
            axes.axvspan(-margin, margin, color=MARGIN, linewidth=0, zorder=0)
        axes.axvline(0, color=BASELINE, linewidth=1, zorder=1)
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelsize=LETTERS)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(visible=False, axis="y")
        chart = Chart(figure)
        for place, row in enumerate(rows):
            color = (colors or {}).get(row.name, COLORS[0])
            _draw(chart, axes, place, row, color, f"+.{digits}f")
            _label(chart, axes, place, row)
    return chart


def _ends(rows: Sequence[Difference], margin: float | None) -> tuple[float, float]:
    """Returns the limits of the axis: all values and the margin, and intervals within reach."""
    shown = [value for row in rows for value in (row.mean, *row.values.values())]
    shown += [0.0] if margin is None else [-margin, margin]
    reach = REACH * max(map(abs, shown))
    for row in rows:
        if row.interval is not None:
            shown += [max(-reach, row.interval[0]), min(reach, row.interval[1])]
    low, high = min(shown), max(shown)
    space = 0.04 * (high - low) or 1.0
    return low - space, high + space


def _draw(chart: Chart, axes: Axes, place: int, row: Difference, color: str, spec: str) -> None:
    """Draws the dots, the interval and the mean of a row."""
    values = list(row.values.values())
    heights = place + 0.14 + 0.13 * np.resize([-1, 1, 0], len(values))  # equal values stay apart
    (dots,) = axes.plot(values, heights, "o", color=color, alpha=0.4, ms=4, mew=0, zorder=2)
    chart.mark(dots, row.name, *(f"{row.name}, {k}: {v:{spec}}" for k, v in row.values.items()))
    shown = f"{row.name}: {row.mean:{spec}}"
    if row.interval is not None:
        low, high = row.interval
        shown += f" [{low:{spec}}, {high:{spec}}]"
        left, right = axes.get_xlim()
        (line,) = axes.plot(
            np.clip((low, high), left, right), [place + 0.14] * 2, color=color, lw=2
        )
        chart.mark(line, row.name, shown)
        for goes_on, edge, arrow in ((low < left, left, "<"), (high > right, right, ">")):
            if goes_on:
                (tip,) = axes.plot([edge], [place + 0.14], arrow, color=color, ms=6, clip_on=False)
                chart.mark(tip, row.name)
    (mean,) = axes.plot([row.mean], [place + 0.14], "D", color=color, ms=6, mec="white", mew=0.8)
    chart.mark(mean, row.name, f"{shown}: {row.verdict}")


def _label(chart: Chart, axes: Axes, place: int, row: Difference) -> None:
    """Writes the name above the left end of a row, and the verdict above its right end."""
    height = place - 0.32
    across = axes.get_yaxis_transform()
    name = row.name if len(row.name) <= 34 else f"{row.name[:33]}…"
    styles: dict[str, Any] = {"fontsize": LETTERS, "va": "center", "transform": across}
    chart.mark(axes.text(0, height, name, fontweight="bold", **styles), row.name, row.name)
    verdict = axes.text(1, height, row.verdict, ha="right", **styles)
    chart.mark(verdict, row.name, row.verdict)
