"""Persistence of Vietoris-Rips filtrations: exact, batched and differentiable.

Which edges are critical is found on detached points and in float64; their lengths are then read off
the points again, so that gradients reach exactly the points that carry each bar.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from topkd.topology import _cocycles, _kernels, _prim, _redzed

OWN_UP_TO = 256  # points up to which H1 is found by our own kernel, which then leaves the cache
WORTH_A_THREAD = 4  # clouds


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
                zero count as padding in dimensions above 0.
            dimension: Of all of them.

        Examples:
            >>> Diagrams.from_bars(torch.tensor([[1.0, 3.0], [2.0, 2.5]])).persistence
            tensor([2.0000, 0.5000])
        """
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


@torch.library.custom_op("topkd::critical_edges", mutates_args=())
def critical_edges(
    source: Tensor, inside: Tensor, given: bool, max_dim: int, rows: int, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the edges at which classes are born and die.

    Args:
        source: Detached points (clouds, n, d), or distances (clouds, n, n) if ``given``.
        inside: Which points are no padding, (clouds, n).
        given: Whether these are distances.
        max_dim: The highest dimension.
        rows: Most bars of each dimension above 0.
        strict: Whether more are an error.

    Returns:
        Edges (clouds, n - 1 + max_dim * rows, 2) at which classes are born, the same at which they
        die, and how many there are, (clouds, max_dim + 1). H0 comes by length, born without an
        edge, then the higher dimensions by persistence; what is not used is 0.

    Raises:
        ValueError: If a cloud has no point, or holds what is no coordinate or no distance; the
            message names it. If there are more bars than rows, and this is strict.
        ImportError: If redzed-tda is needed and not installed.
    """
    clouds, n, _ = source.shape
    if max_dim == 0 and source.device.type != "cpu":
        return _on_device(source, inside, given)
    cpu = source.cpu().contiguous().numpy()
    there = inside.cpu().contiguous().numpy()
    births, deaths = np.zeros((2, clouds, n - 1 + max_dim * rows, 2), np.int64)
    count = np.zeros((clouds, max_dim + 1), np.int64)
    count[:, 0] = there.sum(1) - 1
    if max_dim == 2 or (max_dim == 1 and n > OWN_UP_TO and _redzed.is_installed()):
        _by_redzed(cpu, there, given, births, deaths, count)
    else:
        _by_kernels(cpu, there, given, births, deaths, count)
    if strict and max_dim > 0 and (most := count[:, 1:].max(initial=0)) > rows:
        raise ValueError(
            f"cloud {count[:, 1:].max(1).argmax()} has {most} bars of one dimension, more than "
            f"the {rows} there is room for; give max_bars={most}, or fewer to keep the most "
            "persistent"
        )
    done = (torch.from_numpy(array).to(source.device) for array in (births, deaths, count))
    return tuple(done)  # type: ignore[return-value]


@critical_edges.register_fake
def _(
    source: Tensor, inside: Tensor, given: bool, max_dim: int, rows: int, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    clouds, n, _ = source.shape
    births, deaths = (
        source.new_empty((clouds, n - 1 + max_dim * rows, 2), dtype=torch.int64) for _ in range(2)
    )
    return births, deaths, source.new_empty((clouds, max_dim + 1), dtype=torch.int64)


def _on_device(source: Tensor, inside: Tensor, given: bool) -> tuple[Tensor, Tensor, Tensor]:
    """H0 where the points are."""
    finite = (source.isfinite() | ~inside[..., None]).all() & inside.any(1).all()
    if given:
        pairs = inside[:, :, None] & inside[:, None]
        finite = ((source >= 0) & source.isfinite() & (source == source.mT) | ~pairs).all()
        finite &= (source.diagonal(dim1=1, dim2=2)[inside] == 0).all() & inside.any(1).all()
    if not finite:
        _refuse(source.cpu().numpy(), inside.cpu().numpy(), given)
    squares = source
    if not given:
        wide = source if source.device.type == "mps" else source.double()
        wide = wide.where(inside[..., None], 0)
        squares = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    deaths = _prim.merging_edges(squares, inside)
    return torch.zeros_like(deaths), deaths, inside.sum(1, keepdim=True) - 1


def _by_kernels(
    source: NDArray[Any],
    inside: NDArray[np.bool_],
    given: bool,
    births: NDArray[np.int64],
    deaths: NDArray[np.int64],
    count: NDArray[np.int64],
) -> None:
    clouds, n, width = source.shape
    loops = count.shape[1] == 2
    matrix = given or loops or n <= _kernels.MATRIX
    bits = (0,) * (1 << (max(1, -(-n // 64)) - 1).bit_length())  # compiled for each power of two

    def share(start: int, stop: int) -> int:
        work = _kernels.work(n, 0 if given else width, matrix=matrix)
        if not loops:
            return int(
                _kernels.merging_edges(source, inside, given, matrix, start, stop, work, deaths)
            )
        sorting = _cocycles.sorting(n)
        return int(
            _cocycles.critical_edges(
                source, inside, given, start, stop, work, sorting, bits, births, deaths, count
            )
        )

    threads = min(torch.get_num_threads(), clouds // WORTH_A_THREAD)
    if threads < 2:
        refused = [share(0, clouds)]
    else:
        ends = [clouds * t // threads for t in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            refused = list(pool.map(share, ends[:-1], ends[1:]))
    if max(refused) >= 0:
        _refuse(source, inside, given)


def _by_redzed(
    source: NDArray[Any],
    inside: NDArray[np.bool_],
    given: bool,
    births: NDArray[np.int64],
    deaths: NDArray[np.int64],
    count: NDArray[np.int64],
) -> None:
    n, max_dim = source.shape[1], count.shape[1] - 1
    rows = (births.shape[1] - n + 1) // max_dim
    warnings.warn(
        f"H{max_dim} of {n} points is found by redzed-tda, which compares lengths in float32",
        stacklevel=2,
    )
    for cloud, (values, there) in enumerate(zip(source, inside, strict=True)):
        _refuse(source[cloud : cloud + 1], inside[cloud : cloud + 1], given, cloud)
        index = there.nonzero()[0]
        few = values[index].astype(np.float64)
        distances = few[:, index] if given else squareform(pdist(few))
        merging = deaths[cloud, : len(index) - 1]
        blocks = [slice(start, start + rows) for start in range(n - 1, births.shape[1], rows)]
        higher = [(births[cloud, block], deaths[cloud, block]) for block in blocks]
        count[cloud, 1:] = _redzed.critical_edges(distances, merging, higher)
        merging[:] = index[merging]
        for sides, bars in zip(higher, count[cloud, 1:], strict=True):
            for edges in sides:
                edges[:bars] = index[edges[:bars]]


def _refuse(source: NDArray[Any], inside: NDArray[np.bool_], given: bool, number: int = 0) -> None:
    """Raises an error that names what is no point, or no distance, if there is such a thing."""
    for cloud, (values, there) in enumerate(zip(source, inside, strict=True), number):
        index = there.nonzero()[0]
        if len(index) == 0:
            raise ValueError(f"cloud {cloud}: a cloud needs at least one point, all are masked")
        if not given:
            bad = ~np.isfinite(values[index]).all(1)
            if bad.any():
                raise ValueError(
                    f"cloud {cloud}, point {index[bad.argmax()]}: a coordinate is NaN or infinite; "
                    "a diagram needs finite points"
                )
            continue
        few = values[np.ix_(index, index)]
        wrong = ~(np.isfinite(few) & (few >= 0) & (few == few.T))
        np.fill_diagonal(wrong, few.diagonal() != 0)
        if wrong.any():
            i, j = (index[k] for k in np.argwhere(wrong)[0])
            raise ValueError(
                f"cloud {cloud}: {values[i, j]} from point {i} to {j}, and {values[j, i]} back, is "
                "no distance; these are finite, symmetric, not negative, and 0 on the diagonal"
            )


def edge_lengths(points: Tensor, edges: Tensor) -> Tensor:
    r"""Computes :math:`\lVert x_i - x_j \rVert` for chosen edges; length 0 has gradient 0.

    Sums are in float64 where the device has it, rounded once.

    Args:
        points: (clouds, n, d).
        edges: Indices of points, (clouds, k, 2).

    Returns:
        Lengths, (clouds, k).

    Examples:
        >>> edge_lengths(torch.tensor([[[0.0], [3.0]]]), torch.tensor([[[0, 1], [1, 1]]]))
        tensor([[3., 0.]])
    """
    if points.device.type == "cpu" and points.dtype in (torch.float32, torch.float64):
        lengths: Tensor = _Lengths.apply(points, edges)
        return lengths
    return _plain_lengths(points, edges)


def _plain_lengths(points: Tensor, edges: Tensor) -> Tensor:
    wide = points if points.device.type == "mps" else points.double()
    width = points.shape[-1]
    start, end = (wide.gather(1, e[..., None].expand(-1, -1, width)) for e in edges.unbind(-1))
    square = (start - end).square().sum(-1)
    zero = square == 0  # the root has no derivative there; 0 is a subgradient of the length
    zero |= edges[..., 0] == edges[..., 1]  # what pads a cloud may be NaN
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt()).to(points.dtype)


@torch.library.custom_op("topkd::edge_lengths", mutates_args=())
def _edge_lengths(points: Tensor, edges: Tensor) -> Tensor:
    lengths = points.new_empty(edges.shape[:2])
    _kernels.lengths(_numpy(points), _numpy(edges), lengths.numpy())
    return lengths


@_edge_lengths.register_fake
def _(points: Tensor, edges: Tensor) -> Tensor:
    return points.new_empty(edges.shape[:2])


@torch.library.custom_op("topkd::pull_lengths", mutates_args=())
def _pull_lengths(points: Tensor, edges: Tensor, lengths: Tensor, grad: Tensor) -> Tensor:
    pulled = torch.zeros_like(points, memory_format=torch.contiguous_format)
    _kernels.pull_lengths(
        _numpy(points), _numpy(edges), _numpy(lengths), _numpy(grad), pulled.numpy()
    )
    return pulled


@_pull_lengths.register_fake
def _(points: Tensor, edges: Tensor, lengths: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(points, memory_format=torch.contiguous_format)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().contiguous().numpy()


class _Lengths(torch.autograd.Function):
    """Lengths by the kernels; the gradient of the gradient by plain torch."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, edges: Tensor) -> Tensor:
        lengths = _edge_lengths(points, edges)
        ctx.save_for_backward(points, edges, lengths)
        return lengths

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        points, edges, lengths = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _pull_lengths(points, edges, lengths, grad), None
        again = _plain_lengths(points, edges)
        (pulled,) = torch.autograd.grad(again, points, grad, create_graph=True)
        return pulled, None


def _entries(distances: Tensor, edges: Tensor) -> Tensor:
    """Reads lengths off distance matrices (clouds, n, n); 0 for what is no edge."""
    i, j = edges.unbind(-1)
    each = torch.arange(len(distances), device=distances.device)[:, None]
    return torch.where(i == j, 0.0, distances[each, i, j])
