"""Figures as SVG and PNG."""

from __future__ import annotations

import io
import math
import re
from html import escape
from typing import TYPE_CHECKING

from topkd.reporting.plots.style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_svg(figure: Figure, *, prefix: str, alt: str) -> str:
    """Converts a figure to an ``<svg>`` element for inclusion in a page.

    Args:
        figure: The figure.
        prefix: Prefix of all ids, unique for each figure of a page.
        alt: Alternative text.
    """
    content = io.StringIO()
    with styled():
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
    with styled():
        figure.savefig(content, format="png", dpi=192, metadata={"Software": None})
    return content.getvalue()
