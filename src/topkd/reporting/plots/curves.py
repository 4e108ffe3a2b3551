"""Curves over the epochs of training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from topkd.losses.base import MIN_GRADIENT_SHARE
from topkd.reporting.plots.style import new_figure, palette, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")


def curves(
    runs: Mapping[str, Sequence[Sequence[float]]],
    *,
    title: str,
    ylabel: str,
    colors: Mapping[str, str] | None = None,
    wide: bool = False,
    threshold: float | None = None,
) -> Figure:
    """Plots curves over the epochs: thin lines for seeds, a thick line for their mean.

    Args:
        runs: Name -> one sequence per seed with one value per epoch; NaN where absent.
        title: Title of the figure.
        ylabel: Label of the y axis, with unit.
        colors: Name -> color. Defaults to :func:`palette`.
        wide: Whether to use a logarithmic axis for values that span more than a factor of 30,
            which omits values that are not positive.
        threshold: Position of a dashed horizontal line.
    """
    colors = colors or palette(list(runs))
    styles = dict(zip(colors, itertools.cycle(LINES), strict=False))
    with styled():
        figure = new_figure(4.2, 3.0)
        axes = figure.add_subplot(title=title, xlabel="epoch", ylabel=ylabel)
        for name, seeds in runs.items():
            length = min(len(seed) for seed in seeds)
            values = np.array([seed[:length] for seed in seeds], dtype=float)
            epochs = np.arange(1, length + 1)
            mean = values.mean(0)
            known = np.isfinite(mean)  # not every epoch is evaluated
            if len(values) > 1:
                lines = values.T[known]
                axes.plot(epochs[known], lines, color=colors[name], linewidth=0.7, alpha=0.35)
            axes.plot(
                epochs[known],
                mean[known],
                color=colors[name],
                linewidth=2,
                linestyle=styles[name],
                marker="o" if known.sum() == 1 else None,
                label=name,
            )
        if threshold is not None:
            axes.axhline(threshold, color="#999999", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        _finish_curves(axes, wide=wide)
    return figure


def _finish_curves(axes: Axes, *, wide: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines])
    positive = values[values > 0]
    if wide and len(positive) and positive.max() > 30 * positive.min():
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
    axes.legend(fontsize=9, handlelength=2.4)


def gradient_shares(
    terms: Mapping[str, Sequence[Sequence[float]]],
    *,
    title: str,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Draws the share of each term in the gradient over the epochs, with a line at the threshold.

    Args:
        terms: Term -> one sequence per seed with its share (0 to 1) per epoch.
        title: Title of the figure.
        colors: Term -> color. Defaults to :func:`palette`.
    """
    percent = {name: [[100 * v for v in seed] for seed in seeds] for name, seeds in terms.items()}
    return curves(
        percent,
        title=title,
        ylabel="share of the gradient, %",
        colors=colors,
        wide=True,
        threshold=100 * MIN_GRADIENT_SHARE,
    )
