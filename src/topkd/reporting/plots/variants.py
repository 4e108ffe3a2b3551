"""Figures that compare the variants of a study: trade-offs, learning curves, gradient shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from topkd.reporting.plots.interactive import Chart
from topkd.reporting.plots.style import BASELINE, COLORS, TERMS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

LETTERS = 8.5  # points
MARKERS = "os^Dv"
NO_GRAY = tuple(color for color in COLORS if color != "#555555")  # gray is the baseline's


@dataclass(frozen=True)
class Look:
    """Color and marker of a variant, the same in all figures of a page."""

    color: str
    marker: str


def looks(variants: Sequence[str], baseline: str) -> dict[str, Look]:
    """Assigns a color and a marker to every variant; the baseline is gray.

    Examples:
        >>> looks(["kd", "edges"], "kd")
        {'kd': Look(color='#707070', marker='o'), 'edges': Look(color='#0072B2', marker='s')}
    """
    found = {baseline: Look(BASELINE, MARKERS[0])}
    for number, name in enumerate(variant for variant in variants if variant != baseline):
        # Two variants share a color only with different markers.
        marker = MARKERS[(number + 1 + number // len(NO_GRAY)) % len(MARKERS)]
        found[name] = Look(NO_GRAY[number % len(NO_GRAY)], marker)
    return found


@dataclass(frozen=True)
class Spread:
    """A point of :func:`tradeoff`: means and standard deviations of two quantities."""

    x: float
    y: float
    x_std: float
    y_std: float
    hover: str


def tradeoff(
    points: Mapping[str, Spread], *, title: str, xlabel: str, ylabel: str, looks: Mapping[str, Look]
) -> Chart:
    """Plots two quantities of each variant against each other, with bars of one deviation.

    Args:
        points: Name -> point.
        title: Title of the figure.
        xlabel: Label of the x axis, with unit.
        ylabel: Label of the y axis, with unit.
        looks: Name -> color and marker.
    """
    with styled():
        figure = new_figure(3.7, 3.0)
        axes = figure.add_subplot()
        chart = Chart(figure)
        for name, point in points.items():
            look = looks[name]
            bars = axes.errorbar(
                point.x, point.y, point.y_std, point.x_std, fmt="none", color=look.color, lw=1
            )
            for line in bars[2]:
                chart.mark(line, name)
            (dot,) = axes.plot(
                point.x, point.y, look.marker, color=look.color, ms=7, mec="white", mew=0.8
            )
            chart.mark(dot, name, point.hover)
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))  # a bar may reach below a time of 0
        _finish(axes, title, xlabel, ylabel)
    return chart


def learning_curve(
    seeds: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]],
    *,
    name: str,
    ylabel: str,
    look: Look,
    limits: tuple[float, float],
) -> Chart:
    """Plots one panel of small multiples: a variant in color, the baseline's mean in gray.

    Args:
        seeds: One sequence per seed with one value per epoch; NaN where it was not evaluated.
        baseline: The same for the baseline.
        name: Name of the variant.
        ylabel: Label of the y axis, with unit.
        look: Color of the variant.
        limits: Limits of the y axis, the same for all panels.
    """
    with styled():
        figure = new_figure(1.95, 1.7)
        axes = figure.add_subplot(ylim=limits)
        chart = Chart(figure)
        if baseline:
            _line(axes, *_mean(baseline), BASELINE, 1.6)
        for seed in seeds:
            _line(axes, *_mean([seed]), look.color, 0.6)
        epochs, mean = _mean(seeds)
        line = _line(axes, epochs, mean, look.color, 1.8)
        last = f"{name}, epoch {epochs[-1]}: {mean[-1]:.2f}" if len(mean) else name
        chart.mark(line, name, f"{last} (mean of {len(seeds)})")
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.locator_params(axis="y", nbins=4)
        _finish(axes, name if len(name) <= 22 else f"{name[:21]}…", "epoch", ylabel)
    return chart


def _mean(seeds: Sequence[Sequence[float]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the epochs that all seeds evaluated, and the mean over seeds."""
    length = min(map(len, seeds))
    mean = np.array([seed[:length] for seed in seeds], dtype=float).mean(0)
    known = np.isfinite(mean)
    return np.arange(1, length + 1)[known], mean[known]


def _line(
    axes: Axes, x: NDArray[np.int64], y: NDArray[np.float64], color: str, width: float
) -> Artist:
    marker = "o" if len(x) == 1 else None
    (line,) = axes.plot(x, y, color=color, linewidth=width, marker=marker, markersize=3)
    return line


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel(xlabel, fontsize=LETTERS)
    axes.set_ylabel(ylabel, fontsize=LETTERS)
    axes.tick_params(labelsize=LETTERS)


def share_bars(
    shares: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Chart, dict[str, str]]:
    """Plots the gradient shares of loss terms as one stacked bar per variant.

    Args:
        shares: Variant -> term -> share of the gradient, 0 to 1.
        title: Title of the figure.
        labels: Variant -> label of its bar. Defaults to its name.

    Returns:
        The figure, and term -> color.
    """
    terms = dict.fromkeys(term for each in shares.values() for term in each)
    colors = {term: TERMS[number % len(TERMS)] for number, term in enumerate(terms)}
    with styled():
        figure = new_figure(3.7, 0.4 * len(shares) + 0.8)
        axes = figure.add_subplot(xlim=(0, 100), ylim=(len(shares) - 0.4, -0.75), yticks=[])
        axes.grid(visible=False, axis="y")
        chart = Chart(figure)
        for place, (variant, each) in enumerate(shares.items()):
            left = 0.0
            for term, share in each.items():
                (bar,) = axes.barh(place + 0.16, 100 * share, 0.34, left, color=colors[term])
                chart.mark(bar, variant, f"{variant}, {term}: {100 * share:.3g} %")
                left += 100 * share
            label = labels.get(variant, variant)
            chart.mark(axes.text(0, place - 0.25, label, fontsize=LETTERS, va="center"), variant)
        _finish(axes, title, "share of the gradient, %", "")
    return chart, colors
