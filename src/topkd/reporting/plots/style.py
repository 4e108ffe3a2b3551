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
OTHERS = "#c8c8c8"
TEACHER = "#333333"

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


def palette(names: Sequence[str]) -> dict[str, str]:
    """Assigns a color to every name by position.

    Examples:
        >>> palette(["kd", "student"])
        {'kd': '#0072B2', 'student': '#D55E00'}
    """
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
