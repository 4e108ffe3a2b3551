"""Lengths of selected edges, with gradients at their end points only, and distance matrices."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.library import custom_op

from topkd.topology import _kernels


def edge_lengths(points: Tensor, edges: Tensor) -> Tensor:
    r"""Computes :math:`\lVert x_i - x_j \rVert` for selected edges; length 0 has gradient 0.

    Sums are accumulated in float64 where the device supports it, and rounded once.

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


def pairwise_distances(points: Tensor) -> Tensor:
    """Detached distances (clouds, n, n), exactly symmetric, with a diagonal of exact zeros."""
    upper = difference_form(widened(points.detach())).triu(1)
    return upper + upper.mT


def difference_form(points: Tensor) -> Tensor:
    """Distances (clouds, n, n) from coordinate differences, which is exact for nearby points."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def widened(points: Tensor) -> Tensor:
    """Converts points to float64 where the device supports it."""
    return points if points.device.type == "mps" else points.double()


def _plain_lengths(points: Tensor, edges: Tensor) -> Tensor:
    wide = widened(points)
    width = points.shape[-1]
    start, end = (wide.gather(1, e[..., None].expand(-1, -1, width)) for e in edges.unbind(-1))
    square = (start - end).square().sum(-1)
    zero = square == 0  # the square root has no derivative at 0; 0 is a subgradient of the length
    zero |= edges[..., 0] == edges[..., 1]  # padding may be NaN
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt()).to(points.dtype)


@custom_op("topkd::edge_lengths", mutates_args=())
def _edge_lengths(points: Tensor, edges: Tensor) -> Tensor:
    lengths = points.new_empty(edges.shape[:2])
    _kernels.lengths(_numpy(points), _numpy(edges), lengths.numpy())
    return lengths


@_edge_lengths.register_fake
def _(points: Tensor, edges: Tensor) -> Tensor:
    return points.new_empty(edges.shape[:2])


@custom_op("topkd::pull_lengths", mutates_args=())
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
    """Lengths and gradients by the kernels; second derivatives by PyTorch operations."""

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
