"""Style of all plots: colors, fonts and figures without a window."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#A6761D")
"""Colorblind-safe palette (Okabe & Ito 2008, without its yellow)."""
TERMS = ("#332288", "#44AA99", "#CC6677", "#DDCC77", "#88CCEE", "#117733", "#AA4499", "#999933")
"""Colorblind-safe palette of loss terms (Paul Tol's "muted"), distinct from that of variants."""
OTHERS = "#c8c8c8"
TEACHER = "#333333"
BASELINE = "#707070"
DARK: Mapping[str, str] = {
    "#ffffff": "#161618",
    "#1f1f1f": "#ececea",
    "#444444": "#c9c9c6",
    "#666666": "#b0b0ad",
    "#888888": "#84847f",
    "#e6e6e6": "#333336",
    "#eef2ee": "#22302a",
    "#707070": "#a8a8a4",
    "#c8c8c8": "#5a5a58",
    "#0072b2": "#5aa9e6",
    "#d55e00": "#ff8f4a",
    "#009e73": "#35c79c",
    "#cc79a7": "#e79ec6",
    "#56b4e9": "#9ad7ff",
    "#e69f00": "#ffc251",
    "#a6761d": "#cfa868",
    "#332288": "#8f83e0",
    "#117733": "#4fb573",
}
"""Color of a figure -> the color that replaces it on a dark page."""

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
def styled() -> Iterator[None]:
    """Applies the style of all plots inside a ``with`` block."""
    import matplotlib

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        settings: Any = dict(_STYLE)
        with matplotlib.rc_context(settings):
            yield


def new_figure(width: float, height: float) -> Figure:
    """Creates an empty figure, with width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def palette(names: Sequence[str], colors: Sequence[str] = COLORS) -> dict[str, str]:
    """Assigns a color to every name by position.

    Examples:
        >>> palette(["kd", "student"])
        {'kd': '#0072B2', 'student': '#D55E00'}
    """
    return {name: colors[number % len(colors)] for number, name in enumerate(names)}
