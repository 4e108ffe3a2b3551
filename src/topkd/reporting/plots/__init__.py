"""Plotting functions, which return matplotlib figures.

matplotlib and UMAP are imported on first use. The figures have no window: display them in a
notebook, or save them with ``figure.savefig``, :func:`to_svg` or :func:`to_png`.
"""

from topkd.reporting.plots.curves import curves, gradient_shares
from topkd.reporting.plots.embeddings import class_colors, project, scatter
from topkd.reporting.plots.persistence import (
    barcode,
    diagram,
    filtration,
    persistence_images,
    sorted_deaths,
)
from topkd.reporting.plots.rendering import to_png, to_svg
from topkd.reporting.plots.style import COLORS, palette

__all__ = [
    "COLORS",
    "barcode",
    "class_colors",
    "curves",
    "diagram",
    "filtration",
    "gradient_shares",
    "palette",
    "persistence_images",
    "project",
    "scatter",
    "sorted_deaths",
    "to_png",
    "to_svg",
]
