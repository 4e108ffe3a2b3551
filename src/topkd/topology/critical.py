"""Critical edges of detached points: by the CPU kernels, by redzed-tda or on a GPU."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from torch import Tensor
from torch.library import custom_op

from topkd.topology import _cocycles, _kernels, _prim, _redzed

KERNEL_POINTS = 256  # maximum points for our H1 kernel, whose working set then exceeds the cache
CLOUDS_PER_THREAD = 4  # minimum


class _Task(NamedTuple):
    """Input and output arrays of a backend."""

    source: NDArray[Any]  # points (clouds, n, d), or distances (clouds, n, n) if given
    inside: NDArray[np.bool_]  # (clouds, n)
    given: bool
    births: NDArray[np.int64]  # (clouds, n - 1 + max_dim * rows, 2), zeros
    deaths: NDArray[np.int64]  # the same
    bars: NDArray[np.int64]  # (clouds, max_dim + 1), number of bars; H0 is already set


@custom_op("topkd::critical_edges", mutates_args=())
def critical_edges(
    source: Tensor, inside: Tensor, given: bool, max_dim: int, rows: int, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the edges at which homology classes are born and die.

    Args:
        source: Detached points (clouds, n, d), or distances (clouds, n, n) if ``given``.
        inside: False for padding, (clouds, n).
        given: Whether the source contains distances.
        max_dim: Maximum dimension.
        rows: Maximum number of bars in each dimension above 0.
        strict: Whether more bars raise an error.

    Returns:
        Birth edges and death edges, both (clouds, n - 1 + max_dim * rows, 2), and numbers of bars,
        (clouds, max_dim + 1). H0 is first, sorted by length and without birth edges, then the
        higher dimensions, sorted by persistence. Unused rows are 0.

    Raises:
        ValueError: If a cloud has no point, or a coordinate or distance is invalid; the message
            names it. If there are more bars than rows and ``strict`` is set.
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
    if max_dim == 2 or (max_dim == 1 and n > KERNEL_POINTS and _redzed.is_installed()):
        _by_redzed(_Task(cpu, there, given, births, deaths, count))
    else:
        _by_kernels(_Task(cpu, there, given, births, deaths, count))
    if strict and max_dim > 0 and (most := count[:, 1:].max(initial=0)) > rows:
        raise ValueError(
            f"cloud {count[:, 1:].max(1).argmax()} has {most} bars of one dimension, more than the "
            f"maximum of {rows}; pass max_bars={most}, or fewer to keep the most persistent"
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
    """Computes H0 on the device of the points."""
    finite = (source.isfinite() | ~inside[..., None]).all() & inside.any(1).all()
    if given:
        pairs = inside[:, :, None] & inside[:, None]
        finite = ((source >= 0) & source.isfinite() & (source == source.mT) | ~pairs).all()
        finite &= (source.diagonal(dim1=1, dim2=2)[inside] == 0).all() & inside.any(1).all()
    if not finite:
        _raise_invalid(source.cpu().numpy(), inside.cpu().numpy(), given)
    squares = source
    if not given:
        wide = source if source.device.type == "mps" else source.double()
        wide = wide.where(inside[..., None], 0)
        squares = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    deaths = _prim.merging_edges(squares, inside)
    return torch.zeros_like(deaths), deaths, inside.sum(1, keepdim=True) - 1


def _by_kernels(task: _Task) -> None:
    source, inside, given, births, deaths, count = task
    clouds, n, width = source.shape
    loops = count.shape[1] == 2
    matrix = given or loops or n <= _kernels.MATRIX
    bits = (0,) * (
        1 << (max(1, -(-n // 64)) - 1).bit_length()
    )  # the kernel is compiled for each power of two

    def process(start: int, stop: int) -> int:
        """Processes clouds; returns the first invalid one, or -1."""
        work = _kernels.work(n, 0 if given else width, matrix=matrix)
        read = source, inside, given
        if not loops:
            return int(_kernels.merging_edges(*read, matrix, start, stop, work, deaths))
        store, is_full = (
            n,
            True,
        )  # Gaussian clouds in up to 64 dimensions have fewer classes alive than points
        while is_full:
            room = _cocycles.room(n, len(bits), store)
            start, is_full = _cocycles.critical_edges(
                *read, start, stop, work, room, bits, births, deaths, count
            )
            store *= 2
        return int(start) if start < stop else -1

    threads = min(torch.get_num_threads(), clouds // CLOUDS_PER_THREAD)
    if threads < 2:
        invalid = [process(0, clouds)]
    else:
        ends = [clouds * t // threads for t in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            invalid = list(pool.map(process, ends[:-1], ends[1:]))
    if max(invalid) >= 0:
        _raise_invalid(source, inside, given)


def _by_redzed(task: _Task) -> None:
    source, inside, given, births, deaths, count = task
    n, max_dim = source.shape[1], count.shape[1] - 1
    rows = (births.shape[1] - n + 1) // max_dim
    warnings.warn(
        f"H{max_dim} of {n} points is computed by redzed-tda, which compares lengths in float32",
        stacklevel=2,
    )
    for cloud, (values, there) in enumerate(zip(source, inside, strict=True)):
        _raise_invalid(source[cloud : cloud + 1], inside[cloud : cloud + 1], given, cloud)
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


def _raise_invalid(
    source: NDArray[Any], inside: NDArray[np.bool_], given: bool, number: int = 0
) -> None:
    """Raises ``ValueError`` that names the first invalid point or distance, if there is one."""
    for cloud, (values, there) in enumerate(zip(source, inside, strict=True), number):
        index = there.nonzero()[0]
        if len(index) == 0:
            raise ValueError(f"cloud {cloud}: a cloud needs at least one point, but all are masked")
        if not given:
            bad = ~np.isfinite(values[index]).all(1)
            if bad.any():
                raise ValueError(
                    f"cloud {cloud}, point {index[bad.argmax()]}: a coordinate is NaN or infinite; "
                    "a diagram needs finite points"
                )
            continue
        few = values[np.ix_(index, index)]
        invalid = ~(np.isfinite(few) & (few >= 0) & (few == few.T))
        np.fill_diagonal(invalid, few.diagonal() != 0)
        if invalid.any():
            i, j = (index[k] for k in np.argwhere(invalid)[0])
            raise ValueError(
                f"cloud {cloud}: invalid distances {values[i, j]} from point {i} to {j} and "
                f"{values[j, i]} back; they must be finite, symmetric, non-negative and 0 on the "
                "diagonal"
            )
