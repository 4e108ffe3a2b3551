"""DistanceNet: predicts persistence from distances, the only input persistence depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 1e-6  # lower bound of divisors, for constant features


class DistanceNet(nn.Module):
    r"""Maps a cloud to a vector, invariant to isometries and permutations of its points.

    .. math:: R(X) = \psi\Big(\operatorname{mean}_x \phi(s_x),\ \operatorname{std}_x \phi(s_x),\
        \operatorname{std}_x s_x\Big)

    where :math:`s_x` are the sorted distances from a point to its k nearest neighbors, divided by
    the mean nearest-neighbor distance of the cloud; :math:`\phi` has two layers and :math:`\psi`
    three, with ReLU activations. The network accepts clouds of any width and of more than k points.
    Inputs and outputs are standardized, see :meth:`standardize`.

    Args:
        outputs: Length of the vector.
        neighbors: Number of nearest neighbors, k.
        hidden: Width of the layers of :math:`\phi`; those of :math:`\psi` are twice as wide.
        scale_aware: Whether the logarithm of the mean nearest-neighbor distance is an additional
            input. The network is then no longer invariant to scale.

    References:
        Deep Sets (Zaheer et al., NeurIPS 2017), for the architecture
        https://arxiv.org/abs/1703.06114

    Examples:
        >>> network = DistanceNet(20)
        >>> clouds = torch.randn(8, 64, 32, generator=torch.Generator().manual_seed(0))
        >>> network(clouds).shape
        torch.Size([8, 20])
        >>> torch.allclose(network(3 * clouds + 1), network(clouds), atol=1e-4)
        True
    """

    width = None  # points may have any dimension
    point_mean: Tensor
    point_std: Tensor
    spread_mean: Tensor
    spread_std: Tensor
    output_mean: Tensor
    output_std: Tensor

    def __init__(
        self, outputs: int, *, neighbors: int = 16, hidden: int = 64, scale_aware: bool = False
    ) -> None:
        super().__init__()
        self.outputs, self.neighbors, self.hidden = outputs, neighbors, hidden
        self.scale_aware = scale_aware
        pooled = 2 * hidden + neighbors + scale_aware
        self.point_mlp = nn.Sequential(
            nn.Linear(neighbors, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.cloud_mlp = nn.Sequential(
            nn.Linear(pooled, 2 * hidden),
            nn.ReLU(),
            nn.Linear(2 * hidden, 2 * hidden),
            nn.ReLU(),
            nn.Linear(2 * hidden, outputs),
        )
        for name, width in (("point", neighbors), ("spread", neighbors + 1), ("output", outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that recreate this architecture."""
        return {
            "outputs": self.outputs,
            "neighbors": self.neighbors,
            "hidden": self.hidden,
            "scale_aware": self.scale_aware,
        }

    @torch.no_grad()
    def standardize(self, clouds: Tensor, vectors: Tensor) -> None:
        """Sets input and output statistics to those of training clouds.

        Args:
            clouds: Training clouds, (clouds, n, d), at least two.
            vectors: Their exact vectors, (clouds, outputs).
        """
        distances, spread = self._features(clouds)
        for name, values in (
            ("point", distances.flatten(0, 1)),
            ("spread", spread),
            ("output", vectors),
        ):
            self.get_buffer(f"{name}_mean").copy_(values.mean(0))
            self.get_buffer(f"{name}_std").copy_(values.std(0).clamp(min=FLOOR))

    def forward(self, points: Tensor) -> Tensor:
        """Predicts the vectors of one cloud (n, d) or several (clouds, n, d).

        Raises:
            ValueError: If clouds have at most ``neighbors`` points.
        """
        if points.shape[-2] <= self.neighbors:
            raise ValueError(
                f"clouds must have more than {self.neighbors} points, the number of neighbors, "
                f"got {points.shape[-2]}"
            )
        if points.ndim == 2:
            return self(points[None])[0]
        distances, spread = self._features(points)
        hidden = self.point_mlp((distances - self.point_mean) / self.point_std)
        spread = (spread - self.spread_mean) / self.spread_std
        pooled = [
            hidden.mean(1),
            _deviation(hidden),
            spread[:, : self.neighbors + self.scale_aware],
        ]
        return self.output_mean + self.output_std * self.cloud_mlp(torch.cat(pooled, dim=1))

    def _features(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled distances (clouds, n, k), and their standard deviations with the log scale."""
        distances = torch.cdist(points, points)
        nearest = distances.topk(self.neighbors + 1, largest=False).values[..., 1:]
        scale = nearest[..., 0].mean(1).clamp(min=FLOOR)[:, None]
        nearest = nearest / scale[..., None]
        return nearest, torch.cat([_deviation(nearest), scale.log()], dim=1)


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation over the points of each cloud, differentiable at 0."""
    return (values.var(1, correction=0) + FLOOR).sqrt()
