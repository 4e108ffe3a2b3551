"""Persistence of Vietoris-Rips filtrations: exact, batched and differentiable.

Which edges are critical is found on detached points and in float64; their lengths are then read off
the points again, so that gradients reach exactly the points that carry each bar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from topkd.topology.critical import critical_edges
from topkd.topology.lengths import edge_lengths


@dataclass(frozen=True)
class Diagrams:
    """Persistence diagrams of one or several clouds; one cloud has no batch axis.

    Every birth and every death is the length of an edge between two points, the diameter convention
    of GUDHI and Ripser. Bars are grouped by dimension. In H0 there are n - 1 of them, by increasing
    death, of length zero where points coincide; the one component that never dies is left out. In
    H1 and H2 they come by decreasing persistence, without those of length zero. Padding has births,
    deaths and edges of zero.
    """

    births: Tensor  # (clouds, bars)
    deaths: Tensor  # (clouds, bars)
    birth_edges: Tensor  # (clouds, bars, 2), i < j; in H0, where no edge is needed, 0 and 0
    death_edges: Tensor  # (clouds, bars, 2), i < j
    mask: Tensor  # (clouds, bars), False in padding
    count: Tensor  # (clouds, dimensions), how many bars there are, also those cut off
    sizes: tuple[int, ...]  # bars of each dimension, padding included

    @classmethod
    def from_bars(cls, bars: Tensor, *, dimension: int = 1) -> Diagrams:
        """Makes diagrams of births and deaths that come from elsewhere; they have no edges.

        Args:
            bars: Births and deaths, (bars, 2) or (clouds, bars, 2), all finite; bars of length
                zero count as padding in dimensions above 0. Whole numbers become floats of the
                default type, half precision float32.
            dimension: Of all of them.

        Raises:
            ValueError: If these are no bars: of another shape or type, NaN, infinite, or with a
                death below its birth by more than rounding.

        Examples:
            >>> Diagrams.from_bars(torch.tensor([[1.0, 3.0], [2.0, 2.5]])).persistence
            tensor([2.0000, 0.5000])
        """
        return cls._of_bars(_checked_bars(bars, dimension), dimension)

    @classmethod
    def _of_bars(cls, bars: Tensor, dimension: int) -> Diagrams:
        """Makes diagrams of bars that were read off points, and need no look."""
        births, deaths = bars.unbind(-1)
        edges = torch.zeros(bars.shape, dtype=torch.int64, device=bars.device)
        mask = (deaths > births) | (dimension == 0)
        sizes = tuple(bars.shape[-2] if d == dimension else 0 for d in range(dimension + 1))
        count = mask.new_zeros((*mask.shape[:-1], dimension + 1), dtype=torch.int64)
        count[..., dimension] = mask.sum(-1)
        return cls(births, deaths, edges, edges, mask, count, sizes)

    @property
    def bars(self) -> Tensor:
        """(clouds, bars, 2), births and deaths."""
        return torch.stack([self.births, self.deaths], dim=-1)

    @property
    def persistence(self) -> Tensor:
        """(clouds, bars), deaths less births; never below 0, whatever rounding does."""
        return (self.deaths - self.births).clamp(min=0)

    @property
    def dimension(self) -> Tensor:
        """(bars), the dimension of each."""
        of_each = [torch.full((size,), d) for d, size in enumerate(self.sizes)]
        return torch.cat(of_each).to(self.mask.device)

    def _only(self) -> Diagrams:
        """The single cloud, without batch axis."""
        only: dict[str, Any] = {
            name: value[0] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **only)

    def scaled(self, factor: Tensor | float) -> Diagrams:
        """Multiplies births and deaths, of each cloud by a factor of its own if there are many."""
        if isinstance(factor, Tensor) and factor.ndim > 0:
            factor = factor[..., None]
        return replace(self, births=factor * self.births, deaths=factor * self.deaths)

    def of(self, dimension: int) -> Diagrams:
        """Selects the bars of one dimension.

        Raises:
            ValueError: If that dimension was not computed.
        """
        if not 0 <= dimension < len(self.sizes):
            raise ValueError(
                f"these diagrams have dimensions 0 to {len(self.sizes) - 1}, not {dimension}"
            )
        start = sum(self.sizes[:dimension])
        rows = slice(start, start + self.sizes[dimension])
        return Diagrams(
            births=self.births[..., rows],
            deaths=self.deaths[..., rows],
            birth_edges=self.birth_edges[..., rows, :],
            death_edges=self.death_edges[..., rows, :],
            mask=self.mask[..., rows],
            count=self.count,
            sizes=tuple(n if d == dimension else 0 for d, n in enumerate(self.sizes)),
        )


def _checked_bars(bars: Tensor, dimension: int) -> Tensor:
    if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 0:
        raise ValueError(f"dimension must be a whole number, 0 or above, got {dimension!r}")
    if not isinstance(bars, Tensor):
        raise ValueError(f"bars must be a tensor (bars, 2), got {type(bars).__name__}")
    numbers = not bars.is_complex() and bars.dtype != torch.bool
    if bars.ndim not in (2, 3) or bars.shape[-1] != 2 or not numbers:
        raise ValueError(
            "bars must be numbers (bars, 2) or (clouds, bars, 2), births and deaths, "
            f"got {bars.dtype} {tuple(bars.shape)}"
        )
    if not bars.is_floating_point():
        bars = bars.to(torch.get_default_dtype())
    if bars.dtype in (torch.float16, torch.bfloat16):
        bars = bars.float()
    if torch.compiler.is_compiling():  # a graph must not ask for numbers
        return bars
    births, deaths = bars.detach().unbind(-1)
    rounding = 8 * torch.finfo(bars.dtype).eps * births.abs()
    wrong = ~(bars.detach().isfinite().all(-1) & (deaths >= births - rounding))
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        where = f"cloud {place[0]}, bar {place[1]}" if len(place) > 1 else f"bar {place[0]}"
        birth, death = births[tuple(place)].item(), deaths[tuple(place)].item()
        cure = "births and deaths must be finite, and no death below its birth"
        if death == math.inf and math.isfinite(birth):
            cure = "births and deaths must be finite, leave out what never dies"
        raise ValueError(f"{where}: {cure}, got {birth} and {death}")
    return bars


def rips(
    points: Tensor | None = None,
    *,
    distances: Tensor | None = None,
    max_dim: int = 0,
    mask: Tensor | None = None,
    max_bars: int | None = None,
) -> Diagrams:
    r"""Computes the persistence diagrams of Vietoris-Rips filtrations, over the field Z/2.

    A simplex is present from the length of its longest edge on. H0 tells at which lengths
    components merge, which are those of the minimum spanning tree; H1 from which to which length
    loops are open; H2 the same of voids:

    .. math:: H_0 = \{(0, \lVert x_i - x_j \rVert) : (i, j) \in \mathrm{MST}(x)\}

    Edges of equal length are ordered by their end points: values never depend on that, gradients
    do, and are repeatable. Lengths of zero, of coincident points, have gradient zero.

    H0 costs O(n² d) time a cloud, and O(n) memory beyond 256 points. H0 of points on a GPU is found
    there; all else is found on the CPU, by as many threads as torch uses. H1 of more than 256
    points, and H2, are left to redzed-tda, which ``pip install 'topkd[topology]'`` brings.

    Args:
        points: One cloud, (n, d), or several, (clouds, n, d), of any floating point type; half
            precision gives float32 diagrams.
        distances: Instead of points, their distances, (n, n) or (clouds, n, n): symmetric, not
            negative, with a diagonal of zeros. The triangle inequality is not needed.
        max_dim: The highest dimension, 0, 1 or 2.
        mask: Which points are there and which are padding, (n) or (clouds, n); all, if not told.
        max_bars: At most so many bars of H1 and of H2, the most persistent; ``count`` tells how
            many there are. If not told, room for 4 n, and an error if that is not enough.

    Raises:
        ValueError: If the points are not floats of that shape, a cloud has no point, a coordinate
            is NaN or infinite, or distances are none.
        ImportError: If redzed-tda is needed and not installed.

    References:
        A roadmap for the computation of persistent homology (Otter et al., 2017)
        https://arxiv.org/abs/1506.08903
        Topological Autoencoders (Moor et al., ICML 2020), for the gradient
        https://arxiv.org/abs/1906.00722

    Examples:
        >>> square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> rips(square).deaths
        tensor([1., 1., 1.])
        >>> rips(square, max_dim=1).of(1).bars
        tensor([[1.0000, 1.4142]])
    """
    source, inside, alone = _checked(points, distances, mask, max_dim, max_bars)
    clouds, n, _ = source.shape
    rows = 0 if max_dim == 0 else 4 * n if max_bars is None else max_bars
    birth_edges, death_edges, count = critical_edges(
        source.detach(), inside, points is None, max_dim, rows, max_bars is None
    )
    if max_dim > 0 and not torch.compiler.is_compiling():  # drop the rows that no cloud needs
        most = min(rows, int(count[:, 1:].max())) if clouds else 0
        birth_edges, death_edges = (
            _trimmed(edges, n - 1, rows, most) for edges in (birth_edges, death_edges)
        )
        rows = most
    read = _entries if points is None else edge_lengths
    deaths, sizes = read(source, death_edges), (n - 1, *[rows] * max_dim)
    found = Diagrams(
        births=read(source, birth_edges) if max_dim > 0 else torch.zeros_like(deaths),
        deaths=deaths,
        birth_edges=birth_edges,
        death_edges=death_edges,
        mask=_rows_in_use(count, sizes),
        count=count,
        sizes=sizes,
    )
    return found._only() if alone else found


def _trimmed(edges: Tensor, first: int, rows: int, most: int) -> Tensor:
    """Edges (clouds, first + dimensions * rows, 2) with fewer rows a dimension."""
    if edges.shape[1] == first + rows:
        return edges[:, : first + most]
    blocks = edges[:, first:].unflatten(1, (-1, rows))[:, :, :most]
    return torch.cat([edges[:, :first], blocks.flatten(1, 2)], dim=1)


def _rows_in_use(count: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(clouds, bars), of counts (clouds, dimensions): which rows hold bars."""
    of_each = [
        torch.arange(size, device=count.device) < count[:, d, None] for d, size in enumerate(sizes)
    ]
    return of_each[0] if len(of_each) == 1 else torch.cat(of_each, dim=1)


def _checked(
    points: Tensor | None,
    distances: Tensor | None,
    mask: Tensor | None,
    max_dim: int,
    max_bars: int | None,
) -> tuple[Tensor, Tensor, bool]:
    """Checks shapes and types; clouds, which of their points are there, and if it was one cloud."""
    if (points is None) == (distances is None):
        raise ValueError("give either points or distances")
    if max_dim not in (0, 1, 2):
        raise ValueError(f"max_dim is 0, 1 or 2, got {max_dim}")
    if max_bars is not None and max_bars < 1:
        raise ValueError(f"max_bars is at least 1, got {max_bars}")
    name, shape = ("points", "(n, d)") if distances is None else ("distances", "(n, n)")
    source = points if points is not None else distances
    assert source is not None
    ranks = source.ndim in (2, 3)
    square = points is not None or (ranks and source.shape[-1] == source.shape[-2])
    if not ranks or not square or not source.is_floating_point():
        raise ValueError(
            f"{name} must be floats {shape} or (clouds, {shape[1:]}, "
            f"got {source.dtype} {tuple(source.shape)}"
        )
    if source.shape[-2] == 0:
        raise ValueError(f"a cloud needs at least one point, got {tuple(source.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != source.shape[:-1]):
        raise ValueError(
            f"the mask must be bool {tuple(source.shape[:-1])}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    alone = source.ndim == 2
    if alone:
        source, mask = source[None], None if mask is None else mask[None]
    if mask is None:
        mask = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
    if source.dtype in (torch.float16, torch.bfloat16):
        source = source.float()
    return source, mask, alone


def _entries(distances: Tensor, edges: Tensor) -> Tensor:
    """Reads lengths off distance matrices (clouds, n, n); 0 for what is no edge."""
    i, j = edges.unbind(-1)
    each = torch.arange(len(distances), device=distances.device)[:, None]
    return torch.where(i == j, 0.0, distances[each, i, j])
