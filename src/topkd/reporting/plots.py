"""Plotting functions, which return matplotlib figures.

matplotlib and UMAP are imported on first use. The figures have no window: display them in a
notebook, or save them with ``figure.savefig``, :func:`to_svg` or :func:`to_png`.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.losses.base import MIN_GRADIENT_SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#A6761D")
"""Colorblind-safe palette (Okabe & Ito 2008, without its yellow)."""
LINES = ("-", "--", "-.", ":")
TEACHER = "#333333"
OTHERS = "#c8c8c8"
CLASS_COLORS = (*COLORS, "#6A3D9A", "#B8B000")
NEIGHBORS = 15  # number of neighbors of UMAP, which needs more points than this

_STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelcolor": "#444444",
    "ytick.labelcolor": "#444444",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "text.parse_math": False,  # show dollar signs in names
    "svg.fonttype": "none",  # keep text accessible and searchable
    "svg.hashsalt": "topkd",  # reproducible output
}


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        settings: Any = dict(_STYLE)
        with matplotlib.rc_context(settings):
            yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def palette(names: Sequence[str]) -> dict[str, str]:
    """Assigns a color to every name by position.

    Examples:
        >>> palette(["kd", "student"])
        {'kd': '#0072B2', 'student': '#D55E00'}
    """
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}


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
    with _style():
        figure = _figure(4.2, 3.0)
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
    with _style():
        figure = _figure(3.2, 3.0)
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
    with _style():
        figure = _figure(2.3 * len(lengths), 2.5)
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
    with _style():
        figure = _figure(3.4, 3.2)
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
    with _style():
        figure = _figure(3.2, 3.0)
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
    with _style():
        figure = _figure(1.35 * len(truth) + 0.9, 3.1)
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


def project(points: ArrayLike, *, seed: int = 0) -> tuple[NDArray[Any], str]:
    """Projects points to two dimensions by UMAP, or by PCA if there are too few points.

    Args:
        points: (n, d).
        seed: Random seed of UMAP.

    Returns:
        Coordinates, (n, 2), and the name of the method.

    Raises:
        ValueError: If there are fewer than two points.

    References:
        UMAP: Uniform Manifold Approximation and Projection (McInnes et al., 2018)
        https://arxiv.org/abs/1802.03426
    """
    x = np.asarray(points, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"at least two points (n, d) are needed, got {x.shape}")
    if len(x) <= NEIGHBORS:
        left, scale, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
        places = np.zeros((len(x), 2))
        places[:, : min(2, len(scale))] = (left * scale)[:, :2]
        return places, "PCA, too few points for UMAP"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optional packages, disconnected clusters
        import umap

        reducer = umap.UMAP(n_neighbors=NEIGHBORS, random_state=seed, n_jobs=1)
        return np.asarray(reducer.fit_transform(x), dtype=np.float64), "UMAP"


def class_colors(target: Sequence[int]) -> dict[int, str]:
    """Assigns colors to the ten most frequent classes.

    Args:
        target: The class of each image.

    Returns:
        Class -> color, by class.

    Examples:
        >>> list(class_colors([3, 1, 1, 2]))
        [1, 2, 3]
    """
    ranked = sorted(Counter(target).items(), key=lambda item: (-item[1], item[0]))
    chosen = sorted(number for number, _ in ranked[: len(CLASS_COLORS)])
    return dict(zip(chosen, CLASS_COLORS, strict=False))


def scatter(
    places: ArrayLike, target: Sequence[int], *, title: str, names: Mapping[int, str] | None = None
) -> Figure:
    """Plots points by class; classes beyond the ten most frequent are gray.

    Args:
        places: Coordinates from :func:`project`, (n, 2).
        target: The class of each point.
        title: Title of the figure.
        names: Class names for the legend, which is omitted without them.

    Raises:
        ValueError: If the numbers of points and labels differ.
    """
    spots, classes = np.asarray(places, dtype=float), np.asarray(target)
    if spots.shape != (len(classes), 2):
        raise ValueError(f"places must be (n, 2) for n classes, got {spots.shape}, {classes.shape}")
    colors = class_colors(classes.tolist())
    with _style():
        figure = _figure(3.4, 3.4 if names is None else 4.0)
        axes = figure.add_subplot(title=title)
        gray = ~np.isin(classes, list(colors))
        if gray.any():
            x, y = spots[gray].T
            axes.scatter(x, y, 8, OTHERS, linewidths=0, label="others")
        for number, color in colors.items():
            label = (names or {}).get(number, str(number))
            x, y = spots[classes == number].T
            axes.scatter(x, y, 10, color, linewidths=0, alpha=0.85, label=label)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        if names is not None:
            figure.legend(loc="outside lower center", ncols=5, fontsize=8, markerscale=2)
    return figure


def to_svg(figure: Figure, *, prefix: str, alt: str) -> str:
    """Converts a figure to an ``<svg>`` element for inclusion in a page.

    Args:
        figure: The figure.
        prefix: Prefix of all ids, unique for each figure of a page.
        alt: Alternative text.
    """
    content = io.StringIO()
    with _style():
        figure.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\b(id=\"|href=\"#|url\(#)", rf"\1{prefix}-", svg[svg.index("<svg") :])
    # Widths in points would be fixed; the view box keeps the aspect ratio.
    size = re.search(r"viewBox=\"0 0 ([\d.]+)", svg)
    width = math.ceil(float(size[1]) * 96 / 72) if size else 400
    svg = re.sub(r"(<svg[^>]*?) width=\"[\d.]+pt\"", rf'\1 width="{width}"', svg, count=1)
    svg = re.sub(r"(<svg[^>]*?) height=\"[\d.]+pt\"", r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).strip()


def to_png(figure: Figure) -> bytes:
    """Converts a figure to a PNG at 192 dots per inch."""
    content = io.BytesIO()
    with _style():
        figure.savefig(content, format="png", dpi=192, metadata={"Software": None})
    return content.getvalue()
