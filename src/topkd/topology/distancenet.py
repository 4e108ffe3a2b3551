"""A network that guesses persistence from distances, which are all that persistence depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 1e-6  # of what is divided by, where something does not vary at all


class DistanceNet(nn.Module):
    r"""Maps a cloud to numbers by the distances in it, whatever its place, direction and order.

    .. math:: R(X) = \psi\Big(\operatorname{mean}_x \phi(s_x),\ \operatorname{std}_x \phi(s_x),\
        \operatorname{std}_x s_x\Big)

    where :math:`s_x` are the distances from a point to its k nearest, in order and in units of the
    mean distance to the nearest; :math:`\phi` has two layers, :math:`\psi` three, with ReLU in
    between. Clouds of any width and number of points can be told, and a cloud and its image under
    an isometry are the same to it. All goes in and out standardized, see :meth:`standardize`.

    Args:
        outputs: How many numbers describe a cloud.
        neighbors: How many distances of each point are looked at, k.
        hidden: Width of the layers of :math:`\phi`; those of :math:`\psi` are twice as wide.
        sees_scale: Whether it is also told the logarithm of the unit. What it then learns is no
            longer the same for a cloud and for a larger copy of it.

    References:
        Deep Sets (Zaheer et al., NeurIPS 2017), for the form https://arxiv.org/abs/1703.06114

    Examples:
        >>> network = DistanceNet(20)
        >>> clouds = torch.randn(8, 64, 32, generator=torch.Generator().manual_seed(0))
        >>> network(clouds).shape
        torch.Size([8, 20])
        >>> torch.allclose(network(3 * clouds + 1), network(clouds), atol=1e-4)
        True
    """

    width = None  # of the points: any
    each_mean: Tensor
    each_std: Tensor
    spread_mean: Tensor
    spread_std: Tensor
    answer_mean: Tensor
    answer_std: Tensor

    def __init__(
        self, outputs: int, *, neighbors: int = 16, hidden: int = 64, sees_scale: bool = False
    ) -> None:
        super().__init__()
        self.outputs, self.neighbors, self.hidden = outputs, neighbors, hidden
        self.sees_scale = sees_scale
        pooled = 2 * hidden + neighbors + sees_scale
        self.each = nn.Sequential(
            nn.Linear(neighbors, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.whole = nn.Sequential(
            nn.Linear(pooled, 2 * hidden),
            nn.ReLU(),
            nn.Linear(2 * hidden, 2 * hidden),
            nn.ReLU(),
            nn.Linear(2 * hidden, outputs),
        )
        for name, width in (("each", neighbors), ("spread", neighbors + 1), ("answer", outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    @property
    def settings(self) -> dict[str, Any]:
        """What makes a network of this shape again."""
        return {
            "outputs": self.outputs,
            "neighbors": self.neighbors,
            "hidden": self.hidden,
            "sees_scale": self.sees_scale,
        }

    @torch.no_grad()
    def standardize(self, clouds: Tensor, vectors: Tensor) -> None:
        """Chooses what goes in and out to have mean 0 and standard deviation 1 on such clouds.

        Args:
            clouds: (clouds, n, d), at least two.
            vectors: What describes them, (clouds, outputs).
        """
        distances, spread = self._look(clouds)
        for name, values in (
            ("each", distances.flatten(0, 1)),
            ("spread", spread),
            ("answer", vectors),
        ):
            self.get_buffer(f"{name}_mean").copy_(values.mean(0))
            self.get_buffer(f"{name}_std").copy_(values.std(0).clamp(min=FLOOR))

    def forward(self, points: Tensor) -> Tensor:
        """Guesses for one cloud (n, d) or several (clouds, n, d).

        Raises:
            ValueError: If a cloud has no more points than it looks at neighbors.
        """
        if points.shape[-2] <= self.neighbors:
            raise ValueError(
                f"this network looks at {self.neighbors} neighbors of every point, so that "
                f"clouds need more points than that, got {points.shape[-2]}"
            )
        if points.ndim == 2:
            return self(points[None])[0]
        distances, spread = self._look(points)
        seen = self.each((distances - self.each_mean) / self.each_std)
        spread = (spread - self.spread_mean) / self.spread_std
        pooled = [seen.mean(1), _deviation(seen), spread[:, : self.neighbors + self.sees_scale]]
        return self.answer_mean + self.answer_std * self.whole(torch.cat(pooled, dim=1))

    def _look(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(clouds, n, k) distances in units of the cloud; their spread and the log of the unit."""
        distances = torch.cdist(points, points)
        nearest = distances.topk(self.neighbors + 1, largest=False).values[..., 1:]
        unit = nearest[..., 0].mean(1).clamp(min=FLOOR)[:, None]
        nearest = nearest / unit[..., None]
        return nearest, torch.cat([_deviation(nearest), unit.log()], dim=1)


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation over the points of each cloud, with a gradient also where it is 0."""
    return (values.var(1, correction=0) + FLOOR).sqrt()
