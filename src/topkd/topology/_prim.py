"""Batched minimum spanning trees in PyTorch operations, for points on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def merging_edges(squares: Tensor, inside: Tensor) -> Tensor:
    """Finds the minimum spanning trees of all clouds at once, with edges ordered by (length, i, j).

    Args:
        squares: Distances or their squares, (clouds, n, n).
        inside: False for padding, (clouds, n).

    Returns:
        Edges (clouds, n - 1, 2), i < j, sorted by length; (0, 0) for padding.
    """
    clouds, n, _ = squares.shape
    vertex, each = (
        torch.arange(n, device=squares.device),
        torch.arange(clouds, device=squares.device),
    )
    v = inside.int().argmax(1)  # the first point
    outside = inside.clone()
    nearest = squares.new_full((clouds, n), torch.inf)
    tag = torch.zeros_like(nearest, dtype=torch.int64)  # i n + j of the edge of that distance
    lengths, tags = [], []
    for _ in range(n - 1):
        outside[each, v] = False
        row = squares[each, v]
        code = torch.minimum(v[:, None], vertex) * n + torch.maximum(v[:, None], vertex)
        closer = (row < nearest) | ((row == nearest) & (code < tag))
        nearest, tag = torch.where(closer, row, nearest), torch.where(closer, code, tag)
        left = torch.where(outside, nearest, torch.inf)
        least = left.amin(1)
        first = torch.where(outside & (left == least[:, None]), tag, n * n).amin(1)
        joined = outside & (tag == first[:, None]) & (left == least[:, None])
        v = torch.where(joined.any(1), joined.int().argmax(1), v)
        lengths.append(least)
        tags.append(torch.where(least < torch.inf, first, 0))
    if not tags:
        return tag.new_zeros(clouds, 0, 2)
    length, code = torch.stack(lengths, 1), torch.stack(tags, 1)
    by_code = code.argsort(dim=1, stable=True)
    order = by_code.gather(1, length.gather(1, by_code).argsort(dim=1, stable=True))
    code = code.gather(1, order)
    return torch.stack([code // n, code % n], dim=-1)
