"""Distances between persistence diagrams."""

import torch
from torch import Tensor

from topkd.topology.rips import Diagrams


def wasserstein(first: Diagrams, second: Diagrams, *, order: float = 1.0) -> Tensor:
    r"""Computes Wasserstein distances between H0 diagrams with equally many bars.

    Every bar is matched with a bar, none with the diagonal: the n - 1 sorted deaths are compared
    one by one, which is the cheapest such matching.

    .. math:: \Big(\sum_k |d_{(k)} - d'_{(k)}|^p\Big)^{1/p}

    Args:
        first: Diagrams of one or several clouds.
        second: As many, of clouds with as many points; their dimension may differ.
        order: The exponent p, at least 1.

    Returns:
        One distance for each pair of clouds, in the unit of the points.

    Raises:
        ValueError: If the diagrams differ in shape, or the order is below 1.

    References:
        Computational Optimal Transport (Peyré & Cuturi, 2019), remark 2.28
        https://arxiv.org/abs/1803.00567

    Examples:
        >>> from topkd.topology import rips
        >>> segment = torch.tensor([[0.0], [1.0], [3.0]])
        >>> wasserstein(rips(segment), rips(2 * segment))
        tensor(3.)
    """
    if first.deaths.shape != second.deaths.shape:
        shapes = tuple(first.deaths.shape), tuple(second.deaths.shape)
        raise ValueError(f"diagrams differ in shape: {shapes[0]} and {shapes[1]}")
    if not order >= 1:
        raise ValueError(f"the order of a Wasserstein distance is at least 1, got {order}")
    # Deaths are sorted already, but re-read lengths may cross by one unit in the last place.
    gap = first.deaths.sort(-1).values - second.deaths.sort(-1).values
    if gap.shape[-1] == 0:  # clouds of one point
        return gap.sum(-1)
    return torch.linalg.vector_norm(gap, ord=order, dim=-1)
