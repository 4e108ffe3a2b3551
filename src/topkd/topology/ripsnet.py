"""RipsNet: the approximator of the TopKD paper."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "sum"]

_WIDTHS = {
    16: (16, 16, 16),
    32: (32, 16, 16),
    64: (64, 32, 32),
    128: (128, 64, 64),
    256: (256, 128, 128),
    512: (512, 256, 256),
    1024: (512, 256, 256),
    2048: (1024, 512, 256),
}


class RipsNet(nn.Module):
    r"""Maps a cloud to a vector in [0, 1], invariant to permutations of its points (DeepSets).

    .. math:: R(X) = \psi\Big(\mathrm{pool}_{x \in X}\, \phi(x)\Big)

    where :math:`\phi` has three layers with bias, whose widths depend on d, and :math:`\psi` has
    layers of 50, 100, 200 and ``outputs`` units without bias. Activations are ReLU, with a sigmoid
    at the end. The keys of the state dict match the weights published by TopKD's authors.

    Args:
        width: Dimension d of the points. Dimensions that the paper does not list use the layers of
            the next larger one.
        outputs: Length of the vector.
        pooling: Mean or sum over the points.

    References:
        RipsNet: a general architecture for fast and robust estimation of the persistent homology
        of point clouds (de Surrel et al., TAG-ML at ICML 2022)
        https://proceedings.mlr.press/v196/surrel22a.html

    Examples:
        >>> import torch
        >>> network = RipsNet(64)
        >>> network(torch.zeros(8, 64, 64)).shape, sum(w.numel() for w in network.parameters())
        (torch.Size([8, 400]), 113896)
    """

    def __init__(self, width: int, outputs: int = 400, *, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.width, self.outputs, self.pooling = width, outputs, pooling
        first, second, third = _WIDTHS[min((w for w in _WIDTHS if w >= width), default=2048)]
        self.layer1 = _Dense(width, first, bias=True)
        self.layer2 = _Dense(first, second, bias=True)
        self.layer3 = _Dense(second, third, bias=True)
        self.layer4 = _Dense(third, 50, bias=False)
        self.layer5 = _Dense(50, 100, bias=False)
        self.layer6 = _Dense(100, 200, bias=False)
        self.layer7 = _Dense(200, outputs, bias=False)

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that recreate this architecture."""
        return {"width": self.width, "outputs": self.outputs, "pooling": self.pooling}

    def forward(self, points: Tensor) -> Tensor:
        """Predicts the vectors of one cloud (n, d) or several (clouds, n, d)."""
        x = points
        for layer in (self.layer1, self.layer2, self.layer3):
            x = F.relu(layer(x))
        x = x.mean(-2) if self.pooling == "mean" else x.sum(-2)
        for layer in (self.layer4, self.layer5, self.layer6):
            x = F.relu(layer(x))
        return self.layer7(x).sigmoid()


class _Dense(nn.Module):
    """A linear layer with the key of the published weights."""

    def __init__(self, width_in: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
