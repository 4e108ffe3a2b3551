"""Persistence of Vietoris-Rips filtrations: exact, batched and differentiable.

Critical edges are found on detached points in float64. Their lengths are then recomputed from the
points, so gradients reach exactly the end points of critical edges.
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
    """Persistence diagrams of one or several clouds; a single cloud has no batch axis.

    Births and deaths are lengths of edges between two points, the diameter convention of GUDHI and
    Ripser. Bars are grouped by dimension. H0 has n - 1 bars in order of death, of length zero for
    coincident points; the component that never dies is omitted. Bars of H1 and H2 are in order of
    decreasing persistence, without those of length zero. Births, deaths and edges of padding are 0.
    """

    births: Tensor  # (clouds, bars)
    deaths: Tensor  # (clouds, bars)
    birth_edges: Tensor  # (clouds, bars, 2), i < j; (0, 0) in H0
    death_edges: Tensor  # (clouds, bars, 2), i < j
    mask: Tensor  # (clouds, bars), False in padding
    count: Tensor  # (clouds, dimensions), number of bars, including truncated ones
    sizes: tuple[int, ...]  # bars per dimension, including padding

    @classmethod
    def from_bars(cls, bars: Tensor, *, dimension: int = 1) -> Diagrams:
        """Creates diagrams from given births and deaths; they have no edges.

        Args:
            bars: Births and deaths, (bars, 2) or (clouds, bars, 2), all finite. In dimensions above
                0, bars of length zero are padding. Integers are converted to the default dtype,
                half precision to float32.
            dimension: Dimension of all bars.

        Raises:
            ValueError: If the bars have an invalid shape or type, are NaN or infinite, or a death
                is below its birth by more than rounding.

        Examples:
            >>> Diagrams.from_bars(torch.tensor([[1.0, 3.0], [2.0, 2.5]])).persistence
            tensor([2.0000, 0.5000])
        """
        return cls._of_bars(_checked_bars(bars, dimension), dimension)

    @classmethod
    def _of_bars(cls, bars: Tensor, dimension: int) -> Diagrams:
        """Creates diagrams from valid bars, without validation."""
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
        """(clouds, bars), deaths minus births, clamped at 0."""
        return (self.deaths - self.births).clamp(min=0)

    @property
    def dimension(self) -> Tensor:
        """(bars), dimension of each bar."""
        per_dimension = [torch.full((size,), d) for d, size in enumerate(self.sizes)]
        return torch.cat(per_dimension).to(self.mask.device)

    def _unbatched(self) -> Diagrams:
        """Removes the batch axis of a single cloud."""
        first: dict[str, Any] = {
            name: value[0] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **first)

    def scaled(self, factor: Tensor | float) -> Diagrams:
        """Multiplies births and deaths by a factor, or by one factor per cloud."""
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
        raise ValueError(f"dimension must be an integer, 0 or more, got {dimension!r}")
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
    if torch.compiler.is_compiling():  # values are not available while tracing
        return bars
    births, deaths = bars.detach().unbind(-1)
    rounding = 8 * torch.finfo(bars.dtype).eps * births.abs()
    invalid = ~(bars.detach().isfinite().all(-1) & (deaths >= births - rounding))
    if invalid.any():
        place = invalid.nonzero()[0].tolist()
        where = f"cloud {place[0]}, bar {place[1]}" if len(place) > 1 else f"bar {place[0]}"
        birth, death = births[tuple(place)].item(), deaths[tuple(place)].item()
        rule = "births and deaths must be finite, and deaths not below births"
        if death == math.inf and math.isfinite(birth):
            rule = "births and deaths must be finite; omit classes that never die"
        raise ValueError(f"{where}: {rule}, got {birth} and {death}")
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

    A simplex is present from the length of its longest edge on. H0 contains the lengths at which
    components merge, which are the edges of the minimum spanning tree. H1 contains the lengths at
    which loops are born and die, and H2 those of voids.

    .. math:: H_0 = \{(0, \lVert x_i - x_j \rVert) : (i, j) \in \mathrm{MST}(x)\}

    Edges of equal length are ordered by their end points, so gradients are deterministic; values do
    not depend on this order. Edges of length zero have gradient zero.

    H0 takes O(n² d) time per cloud, and O(n) memory beyond 256 points. H0 of points on a GPU is
    computed there; everything else runs on the CPU, with as many threads as PyTorch uses. H2, and
    H1 of more than 256 points, use redzed-tda: ``pip install 'topkd[topology]'``.

    Args:
        points: One cloud, (n, d), or several, (clouds, n, d), of any floating point type; half
            precision gives float32 diagrams.
        distances: Distance matrices instead of points, (n, n) or (clouds, n, n): symmetric,
            non-negative, with zero diagonal. The triangle inequality is not required.
        max_dim: Maximum dimension, 0, 1 or 2.
        mask: False for padding, (n) or (clouds, n). Defaults to no padding.
        max_bars: Maximum number of bars of H1 and of H2; the most persistent are kept, and
            ``count`` contains the total. Defaults to 4 n, with an error if there are more.

    Raises:
        ValueError: If the points are not floats of that shape, a cloud has no point, a coordinate
            is NaN or infinite, or a distance is invalid.
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
    source, inside, is_single = _checked(points, distances, mask, max_dim, max_bars)
    clouds, n, _ = source.shape
    rows = 0 if max_dim == 0 else 4 * n if max_bars is None else max_bars
    birth_edges, death_edges, count = critical_edges(
        source.detach(), inside, points is None, max_dim, rows, max_bars is None
    )
    if (
        max_dim > 0 and not torch.compiler.is_compiling()
    ):  # drop rows that are padding in every cloud
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
    return found._unbatched() if is_single else found


def _trimmed(edges: Tensor, first: int, rows: int, most: int) -> Tensor:
    """Edges (clouds, first + dimensions * rows, 2), truncated to fewer rows per dimension."""
    if edges.shape[1] == first + rows:
        return edges[:, : first + most]
    blocks = edges[:, first:].unflatten(1, (-1, rows))[:, :, :most]
    return torch.cat([edges[:, :first], blocks.flatten(1, 2)], dim=1)


def _rows_in_use(count: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Mask (clouds, bars) of rows that hold bars, from counts (clouds, dimensions)."""
    per_dimension = [
        torch.arange(size, device=count.device) < count[:, d, None] for d, size in enumerate(sizes)
    ]
    return per_dimension[0] if len(per_dimension) == 1 else torch.cat(per_dimension, dim=1)


def _checked(
    points: Tensor | None,
    distances: Tensor | None,
    mask: Tensor | None,
    max_dim: int,
    max_bars: int | None,
) -> tuple[Tensor, Tensor, bool]:
    """Validates the input; returns clouds, mask and whether there was no batch axis."""
    if (points is None) == (distances is None):
        raise ValueError("pass either points or distances")
    if max_dim not in (0, 1, 2):
        raise ValueError(f"max_dim must be 0, 1 or 2, got {max_dim}")
    if max_bars is not None and max_bars < 1:
        raise ValueError(f"max_bars must be at least 1, got {max_bars}")
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
    is_single = source.ndim == 2
    if is_single:
        source, mask = source[None], None if mask is None else mask[None]
    if mask is None:
        mask = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
    if source.dtype in (torch.float16, torch.bfloat16):
        source = source.float()
    return source, mask, is_single


def _entries(distances: Tensor, edges: Tensor) -> Tensor:
    """Entries of distance matrices (clouds, n, n) at edges; 0 for padding."""
    i, j = edges.unbind(-1)
    each = torch.arange(len(distances), device=distances.device)[:, None]
    return torch.where(i == j, 0.0, distances[each, i, j])
