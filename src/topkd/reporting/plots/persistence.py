"""Barcodes, persistence diagrams and persistence images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.reporting.plots.style import COLORS, OTHERS, TEACHER, new_figure, palette, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")


def barcode(
    deaths: ArrayLike,
    *,
    title: str,
    end: float | None = None,
    unit: str = "",
    color: str = COLORS[0],
) -> Figure:
    """Plots an H0 persistence diagram as a barcode.

    All births are 0, so a plot of births against deaths would be a single column.

    Args:
        deaths: Deaths of the bars, (bars,).
        title: Title of the figure.
        end: Right end of the axis. Defaults to the largest death.
        unit: Unit of the deaths.
        color: Color of the bars.
    """
    lengths = np.sort(np.asarray(deaths, dtype=float))[::-1]
    with styled():
        figure = new_figure(3.2, 3.0)
        axes = figure.add_subplot(title=title, ylabel="bars, longest at the bottom")
        axes.set_xlabel(f"distance{unit and f', {unit}'}")
        axes.hlines(np.arange(1, len(lengths) + 1), 0, lengths, color=color, linewidth=1.6)
        axes.set_xlim(0, 1.03 * (end or max(lengths.max(initial=0), 1e-12)))
        axes.grid(visible=False, axis="y")
    return figure


def filtration(points: ArrayLike, lengths: Sequence[float]) -> Figure:
    """Plots the Rips complex of a planar point cloud at several scales.

    Args:
        points: (n, 2).
        lengths: Scale of each panel.
    """
    cloud = np.asarray(points, dtype=float)
    apart = np.linalg.norm(cloud[:, None] - cloud, axis=-1)
    with styled():
        figure = new_figure(2.3 * len(lengths), 2.5)
        for axes, length in zip(
            np.atleast_1d(figure.subplots(1, len(lengths))), lengths, strict=True
        ):
            near = apart <= length
            for i, j, k in itertools.combinations(range(len(cloud)), 3):
                if near[i, j] and near[j, k] and near[i, k]:
                    axes.fill(*cloud[[i, j, k]].T, color=COLORS[4], alpha=0.25, linewidth=0)
            for i, j in itertools.combinations(range(len(cloud)), 2):
                if near[i, j]:
                    axes.plot(*cloud[[i, j]].T, color=COLORS[0], linewidth=0.9)
            axes.plot(*cloud.T, "o", color=TEACHER, markersize=4)
            axes.set_title(f"length {length:g}")
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
    return figure


def diagram(bars: Mapping[str, ArrayLike], *, title: str) -> Figure:
    """Plots persistence diagrams, with births on the x axis and deaths on the y axis.

    Args:
        bars: Name, such as a dimension -> births and deaths, (bars, 2).
        title: Title of the figure.
    """
    colors = palette(list(bars))
    named = {name: np.asarray(each, dtype=float).reshape(-1, 2) for name, each in bars.items()}
    with styled():
        figure = new_figure(3.4, 3.2)
        axes = figure.add_subplot(title=title, xlabel="birth", ylabel="death")
        end = 1.05 * max(np.max(each, initial=1e-12) for each in named.values())
        axes.plot([0, end], [0, end], color=OTHERS, linewidth=1)
        for (name, each), marker in zip(named.items(), itertools.cycle("osD^"), strict=False):
            axes.plot(*each.T, marker, color=colors[name], label=name, alpha=0.8)
        axes.set_aspect("equal")
        axes.legend(fontsize=9, loc="lower right")
    return figure


def sorted_deaths(
    diagrams: Mapping[str, ArrayLike],
    *,
    title: str,
    unit: str = "",
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Plots the sorted deaths of several H0 diagrams in one figure.

    For equal numbers of bars, the mean gap between two lines is their 1-Wasserstein distance
    divided by the number of bars.

    Args:
        diagrams: Name -> deaths of the bars, (bars,).
        title: Title of the figure.
        unit: Unit of the deaths.
        colors: Name -> color. Defaults to :func:`palette`.
    """
    colors = colors or palette(list(diagrams))
    styles = dict(zip(colors, itertools.cycle(LINES), strict=False))
    with styled():
        figure = new_figure(3.2, 3.0)
        axes = figure.add_subplot(title=title, xlabel="bars, shortest first")
        axes.set_ylabel(f"distance{unit and f', {unit}'}")
        for name, deaths in diagrams.items():
            values = np.sort(np.asarray(deaths, dtype=float))
            bars = np.arange(1, len(values) + 1)
            axes.plot(bars, values, styles[name], color=colors[name], linewidth=1.8, label=name)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=9, handlelength=2.4)
    return figure


def persistence_images(
    exact: ArrayLike, approximated: ArrayLike, *, resolution: int, name: str = "RipsNet"
) -> Figure:
    """Plots exact persistence images above approximated ones, on one color scale.

    Args:
        exact: One row per cloud, (clouds, resolution²), or (clouds, resolution) for vectors,
            which are plotted as bars.
        approximated: The approximations, of the same shape.
        resolution: Height and width of an image, or length of a vector.
        name: Name of the approximator.

    Raises:
        ValueError: If the shapes differ or do not fit the resolution.
    """
    truth, other = np.asarray(exact, dtype=float), np.asarray(approximated, dtype=float)
    if truth.shape != other.shape or truth.ndim != 2:
        raise ValueError(f"shapes differ: exact {truth.shape}, approximated {other.shape}")
    if truth.shape[1] not in (resolution, resolution**2):
        raise ValueError(f"{truth.shape[1]} numbers are no image of resolution {resolution}")
    low, high = min(0.0, truth.min(), other.min()), max(truth.max(), other.max())
    with styled():
        figure = new_figure(1.35 * len(truth) + 0.9, 3.1)
        grid = figure.subplots(2, len(truth), sharex=True, sharey=True, squeeze=False)
        for row, (label, values) in enumerate((("exact", truth), (name, other))):
            for column, value in enumerate(values):
                axes = grid[row, column]
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
                if row == 0:
                    axes.set_title(f"cloud {column + 1}", fontsize=10, fontweight="normal")
                _draw_image(axes, value, resolution, low, high)
            grid[row, 0].set_ylabel(label, fontsize=10)
        if truth.shape[1] != resolution:
            bar = figure.colorbar(grid[0, 0].images[0], ax=grid, shrink=0.8, aspect=18)
            bar.outline.set_visible(False)
    return figure


def _draw_image(axes: Axes, value: NDArray[Any], resolution: int, low: float, high: float) -> None:
    if len(value) == resolution:
        axes.bar(range(resolution), value, width=0.9, color=COLORS[0])
        axes.set_ylim(low, high * 1.02 or 1.0)
        return
    pixels = value.reshape(resolution, resolution)  # one row per persistence, increasing
    axes.imshow(pixels, vmin=low, vmax=high or 1.0, cmap="cividis", origin="lower", aspect="equal")
