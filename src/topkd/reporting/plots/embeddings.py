"""Projections of embeddings to two dimensions."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.reporting.plots.style import COLORS, OTHERS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASS_COLORS = (*COLORS, "#6A3D9A", "#B8B000")
NEIGHBORS = 15  # number of neighbors of UMAP, which needs more points than this


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
    with styled():
        figure = new_figure(3.4, 3.4 if names is None else 4.0)
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
