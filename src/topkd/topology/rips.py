"""Persistence of Vietoris-Rips filtrations: exact, batched and differentiable.

Which edges are critical is found on detached points and in float64; their lengths are then read off
the points again, so that gradients reach exactly the points that carry each bar.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from topkd.topology import _kernels


@dataclass(frozen=True)
class Diagrams:
    """The H0 persistence diagrams of one or several clouds; one cloud has no batch axis."""

    bars: Tensor  # (clouds, n - 1, 2), births and deaths, by increasing death
    edges: Tensor  # (clouds, n - 1, 2), the critical edges, i < j: whose length each death is

    @property
    def births(self) -> Tensor:
        """(clouds, n - 1); exactly 0."""
        return self.bars[..., 0]

    @property
    def deaths(self) -> Tensor:
        """(clouds, n - 1); lengths of edges, the diameter convention of GUDHI and Ripser."""
        return self.bars[..., 1]


def rips(points: Tensor) -> Diagrams:
    r"""Computes the H0 persistence diagrams of Vietoris-Rips filtrations.

    The n points of a cloud are n components at scale 0; a component dies at the length of the edge
    that merges it with another. These are the :math:`n - 1` edges of the minimum spanning tree:

    .. math:: \{(0, \lVert x_i - x_j \rVert) : (i, j) \in \mathrm{MST}(x)\}

    The one component that never dies is left out. Bars of length zero, of coincident points, are
    kept and have gradient zero. Edges of equal length are ordered by their end points.

    Costs O(n² d) time and O(n) memory a cloud. Points on another device than the CPU are copied
    there to find the critical edges; lengths and gradients stay where the points are.

    Args:
        points: One cloud, (n, d), or several, (clouds, n, d), of any floating point type; half
            precision gives float32 diagrams.

    Raises:
        ValueError: If the points are not floats of that shape, a cloud has no point, or a
            coordinate is NaN or infinite.

    References:
        Topological Autoencoders (Moor et al., ICML 2020), for the gradient
        https://arxiv.org/abs/1906.00722

    Examples:
        >>> square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> rips(square).deaths
        tensor([1., 1., 1.])
    """
    if points.ndim not in (2, 3) or not points.is_floating_point():
        raise ValueError(
            "points must be floats (n, d) or (clouds, n, d), "
            f"got {points.dtype} {tuple(points.shape)}"
        )
    if points.shape[-2] == 0:
        raise ValueError(f"a cloud needs at least one point, got {tuple(points.shape)}")
    clouds = points if points.ndim == 3 else points[None]
    if clouds.dtype in (torch.float16, torch.bfloat16):
        clouds = clouds.float()
    edges = critical_edges(clouds.detach())
    # Lengths are summed in float64 where the device has it, and rounded once.
    wide = clouds if clouds.device.type == "mps" else clouds.double()
    deaths = edge_lengths(wide, edges).to(clouds.dtype)
    bars = torch.stack([torch.zeros_like(deaths), deaths], dim=-1)
    return Diagrams(bars, edges) if points.ndim == 3 else Diagrams(bars[0], edges[0])


@torch.library.custom_op("topkd::critical_edges", mutates_args=())
def critical_edges(points: Tensor) -> Tensor:
    """Finds the edges at which components merge: (clouds, n, d) -> (clouds, n - 1, 2), by length.

    Args:
        points: Detached clouds.

    Raises:
        ValueError: If a coordinate is NaN or infinite; the message names the first such point.
    """
    cpu = points.to("cpu", torch.float64).contiguous().numpy()
    if not np.isfinite(cpu).all():
        cloud, point, _ = np.argwhere(~np.isfinite(cpu))[0]
        raise ValueError(
            f"cloud {cloud}, point {point}: a coordinate is NaN or infinite; "
            "a diagram needs finite points"
        )
    edges = np.empty((cpu.shape[0], cpu.shape[1] - 1, 2), np.int64)
    _kernels.merging_edges(cpu, edges)
    return torch.from_numpy(edges).to(points.device)


@critical_edges.register_fake
def _(points: Tensor) -> Tensor:
    clouds, n, _ = points.shape
    return points.new_empty((clouds, n - 1, 2), dtype=torch.int64)


def edge_lengths(points: Tensor, edges: Tensor) -> Tensor:
    r"""Computes :math:`\lVert x_i - x_j \rVert` for chosen edges; length 0 has gradient 0.

    Args:
        points: (clouds, n, d).
        edges: Indices of points, (clouds, k, 2).

    Returns:
        Lengths, (clouds, k).

    Examples:
        >>> edge_lengths(torch.tensor([[[0.0], [3.0]]]), torch.tensor([[[0, 1], [1, 1]]]))
        tensor([[3., 0.]])
    """
    width = points.shape[-1]
    start, end = (points.gather(1, e[..., None].expand(-1, -1, width)) for e in edges.unbind(-1))
    square = (start - end).square().sum(-1)
    zero = square == 0  # the root has no derivative there; 0 is a subgradient of the length
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())
