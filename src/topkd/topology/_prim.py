"""Spanning trees of many clouds at once in plain torch, for points that are on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def merging_edges(squares: Tensor, inside: Tensor) -> Tensor:
    """Finds the spanning trees under the order (length, i, j); all clouds grow together.

    Args:
        squares: Distances or their squares, (clouds, n, n).
        inside: Which points are no padding, (clouds, n).

    Returns:
        Edges (clouds, n - 1, 2) by length, i < j; those of padding are 0 and 0.
    """
    clouds, n, _ = squares.shape
    vertex, each = (
        torch.arange(n, device=squares.device),
        torch.arange(clouds, device=squares.device),
    )
    v = inside.int().argmax(1)  # the first point
    outside = inside.clone()
    gap = squares.new_full((clouds, n), torch.inf)
    tag = torch.zeros_like(gap, dtype=torch.int64)  # i n + j of the edge that gives the gap
    lengths, tags = [], []
    for _ in range(n - 1):
        outside[each, v] = False
        row = squares[each, v]
        code = torch.minimum(v[:, None], vertex) * n + torch.maximum(v[:, None], vertex)
        closer = (row < gap) | ((row == gap) & (code < tag))
        gap, tag = torch.where(closer, row, gap), torch.where(closer, code, tag)
        left = torch.where(outside, gap, torch.inf)
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
