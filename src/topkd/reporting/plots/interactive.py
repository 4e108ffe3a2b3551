"""Figures with hover values and hideable series, in the colors of a light or a dark page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from topkd.reporting.plots.rendering import to_svg
from topkd.reporting.plots.style import DARK

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Mark:
    artist: Artist
    series: str
    titles: Sequence[str]


@dataclass
class Chart:
    """A figure whose parts belong to named series and have hover values.

    Examples:
        >>> from topkd.reporting.plots.style import new_figure
        >>> chart = Chart(new_figure(3, 2))
        >>> (dots,) = chart.figure.add_subplot().plot([1, 2], [3, 4], "o")
        >>> chart.mark(dots, "kd", "seed 0: 3.0", "seed 1: 4.0")
        >>> "<title>seed 1: 4.0</title>" in chart.svg(prefix="a", alt="two seeds")
        True
    """

    figure: Figure
    _marks: list[_Mark] = field(default_factory=list)

    def mark(self, artist: Artist, series: str, *titles: str) -> None:
        """Assigns a part of the figure to a series.

        Args:
            artist: A line, collection, patch or text.
            series: Name of the series, by which a page hides it.
            titles: Hover value of the part, or one for each marker of a line without segments.
        """
        artist.set_gid(f"mark{len(self._marks)}")
        self._marks.append(_Mark(artist, series, titles))

    def svg(self, *, prefix: str, alt: str) -> str:
        """Converts the figure to an ``<svg>`` element; see :func:`themed` for its colors.

        Args:
            prefix: Prefix of all ids, unique for each figure of a page.
            alt: Alternative text.
        """
        svg = to_svg(self.figure, prefix=prefix, alt=alt)
        for mark in self._marks:
            svg = _annotated(svg, f'<g id="{prefix}-{mark.artist.get_gid()}">', mark)
        return themed(svg)


def _annotated(svg: str, tag: str, mark: _Mark) -> str:
    """Adds the series and the hover values to the group that starts with a tag."""
    before, _, after = svg.partition(tag)
    titles = [f"<title>{escape(title)}</title>" for title in mark.titles]
    opened = f'{before}{tag[:-1]} data-series="{escape(mark.series)}">'
    if len(titles) < 2:
        return f"{opened}{''.join(titles)}{after}"
    each = iter(titles)  # matplotlib writes the markers of a line in order
    return opened + re.sub(
        r"<use ([^>]*)/>", lambda use: f"<use {use[1]}>{next(each)}</use>", after, count=len(titles)
    )


def themed(svg: str) -> str:
    """Replaces the colors of :data:`~topkd.reporting.plots.style.DARK` by CSS variables.

    Examples:
        >>> themed('<path style="fill: #0072b2; stroke: #123456"/>')
        '<path style="fill: var(--c-0072b2, #0072b2); stroke: #123456"/>'
    """
    return re.sub(
        r"\b(fill|stroke): (#[0-9a-f]{6})\b",
        lambda found: f"{found[1]}: {variable(found[2]) if found[2] in DARK else found[2]}",
        svg,
    )


def variable(color: str) -> str:
    """Returns the CSS variable of a color, with the color of the light page as default.

    Examples:
        >>> variable("#0072B2")
        'var(--c-0072b2, #0072b2)'
    """
    color = color.lower()
    return f"var(--c-{color[1:]}, {color})"
