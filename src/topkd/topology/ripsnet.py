"""RipsNet: a network that guesses the persistence image of a cloud, and how well it guesses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from topkd.topology.images import Vectorisation, from_json, to_json
from topkd.topology.rips import rips

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
    r"""Maps a cloud to numbers between 0 and 1, whatever the order of its points (DeepSets).

    .. math:: R(X) = \psi\Big(\mathrm{pool}_{x \in X}\, \phi(x)\Big)

    with three layers with bias for :math:`\phi`, whose widths depend on the width of the points,
    and layers of 50, 100, 200 and ``outputs`` without bias for :math:`\psi`; ReLU in between, a
    sigmoid at the end. The state dict has the keys of the weights that TopKD's authors publish.

    Args:
        width: Dimension d of the points. Where the paper names no layers for a width, those of
            the next greater one are used.
        outputs: How many numbers describe a cloud.
        pooling: Mean or sum over the points.

    References:
        RipsNet: a general architecture for fast and robust estimation of the persistent homology
        of point clouds (de Surrel et al., TAG-ML at ICML 2022)
        https://proceedings.mlr.press/v196/surrel22a.html

    Examples:
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

    def forward(self, points: Tensor) -> Tensor:
        """Guesses for one cloud (n, d) or several (clouds, n, d)."""
        x = points
        for layer in (self.layer1, self.layer2, self.layer3):
            x = F.relu(layer(x))
        x = x.mean(-2) if self.pooling == "mean" else x.sum(-2)
        for layer in (self.layer4, self.layer5, self.layer6):
            x = F.relu(layer(x))
        return self.layer7(x).sigmoid()


class _Dense(nn.Module):
    """A linear layer under the name that published weights give it."""

    def __init__(self, width_in: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@dataclass(frozen=True)
class Fidelity:
    """How well an approximator stands for exact persistence on clouds that it has not seen.

    A network that always answers with the mean image of its training clouds has R² = 0.
    """

    r2: float
    gradient_cosine: float  # with the exact gradient, median over pairs of clouds
    gradient_cosine_low: float  # 10 % of the pairs are below
    clouds: int
    silent: int  # pairs at which one of the gradients is 0, not counted in the cosines

    def __str__(self) -> str:
        return (
            f"R² {self.r2:.2f} on {self.clouds} held-out clouds, cosine with the exact gradient "
            f"{self.gradient_cosine:.2f} (10 % below {self.gradient_cosine_low:.2f})"
        )


@dataclass(frozen=True)
class Training:
    """How a RipsNet is trained; the defaults are the paper's, but for passes and epochs."""

    passes: int = 8  # augmented passes over the training images that make one epoch of clouds
    epochs: int = 300
    patience: int = 50  # epochs without improvement on the held-out clouds
    lr: float = 5e-4
    clouds_per_step: int = 64
    pooling: Pooling = "mean"


def cut_clouds(embeddings: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Shuffles embeddings (images, d) and cuts them into clouds (clouds, size, d); drops a rest."""
    order = torch.randperm(len(embeddings), generator=generator)
    order = order[: len(order) - len(order) % size]
    return embeddings[order].view(-1, size, embeddings.shape[-1])


def train(
    stream: Callable[[int], Tensor],
    held_out: Tensor,
    vectorisation: Vectorisation,
    training: Training,
    *,
    seed: int = 0,
    state: dict[str, Any] | None = None,
    after_epoch: Callable[[int, float, dict[str, Any]], None] = lambda epoch, error, state: None,
) -> RipsNet:
    """Trains a RipsNet by Adamax on the mean squared error; keeps the best on held-out clouds.

    Args:
        stream: Epoch -> clouds (clouds, n, d), a function of the epoch alone. The exact images
            they are compared with are made here, in microseconds a cloud.
        held_out: Clouds that never are in the stream, (clouds, n, d).
        vectorisation: What the network learns to guess; at most 1.
        training: Length, rate and pooling.
        seed: Of the weights at the start and of the order of the clouds.
        state: As ``after_epoch`` was given it, to go on from there to the same result.
        after_epoch: Called with the epoch, the held-out error and the state, which changes with the
            next step: copy or write it at once.

    Returns:
        The network, in eval mode and without gradients.
    """
    torch.manual_seed(seed)
    network = RipsNet(held_out.shape[-1], vectorisation.size, pooling=training.pooling)
    optimizer = torch.optim.Adamax(network.parameters(), lr=training.lr)
    best, best_error, best_epoch, first = copy.deepcopy(network.state_dict()), math.inf, 0, 1
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        best, best_error, best_epoch = state["best"], state["best_error"], state["best_epoch"]
        first = state["epoch"] + 1
    exact = vectorisation(rips(held_out))
    for epoch in range(first, training.epochs + 1):
        if epoch - best_epoch > training.patience:
            break
        clouds = stream(epoch)
        images = vectorisation(rips(clouds))
        order = torch.randperm(len(clouds), generator=torch.Generator().manual_seed(seed + epoch))
        for step in order.split(training.clouds_per_step):
            optimizer.zero_grad()
            F.mse_loss(network(clouds[step]), images[step]).backward()
            optimizer.step()
        with torch.no_grad():
            error = F.mse_loss(network(held_out), exact).item()
        if error < best_error - 1e-10:
            best, best_error, best_epoch = copy.deepcopy(network.state_dict()), error, epoch
        after_epoch(
            epoch,
            error,
            {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best": best,
                "best_error": best_error,
                "best_epoch": best_epoch,
                "epoch": epoch,
            },
        )
    network.load_state_dict(best)
    return network.eval().requires_grad_(False)


def fidelity(
    network: nn.Module, vectorisation: Vectorisation, clouds: Tensor, held_out: Tensor
) -> Fidelity:
    r"""Measures how well a network stands for exact persistence.

    .. math:: R^2 = 1 - \frac{\sum_X \lVert R(X) - V(X) \rVert^2}
        {\sum_X \lVert \bar V - V(X) \rVert^2}

    over held-out clouds, where V is exact and :math:`\bar V` its mean over training clouds; and
    the cosine between the gradients of :math:`\mathrm{MSE}(R(X), R(Y))` and of
    :math:`\mathrm{MSE}(V(X), V(Y))` with respect to the points of Y, for neighbouring X and Y.

    Args:
        network: The approximator R.
        vectorisation: The exact V.
        clouds: Training clouds, (clouds, n, d).
        held_out: Held-out clouds, at least two, (clouds, n, d).
    """
    with torch.no_grad():
        truth, guess = vectorisation(rips(held_out)), network(held_out)
        mean = vectorisation(rips(clouds)).mean(0)
    r2 = 1 - (guess - truth).square().sum() / (mean - truth).square().sum()

    moved = held_out.roll(1, 0).clone().requires_grad_()
    losses = (
        (network(moved) - guess).square().mean(-1).sum(),
        (vectorisation(rips(moved)) - truth).square().mean(-1).sum(),
    )
    guessed, exact = (torch.autograd.grad(loss, moved)[0].flatten(1).double() for loss in losses)
    lengths = guessed.norm(dim=1) * exact.norm(dim=1)
    heard = lengths > 0
    cosines = (guessed * exact).sum(1)[heard] / lengths[heard]
    low, median = (
        cosines.quantile(torch.tensor([0.1, 0.5]).double()).tolist() if len(cosines) else (0.0, 0.0)
    )
    return Fidelity(r2.item(), median, low, len(held_out), int((~heard).sum()))


@dataclass(frozen=True)
class Approximation:
    """A trained network with all that is needed to use it again."""

    network: RipsNet
    vectorisation: Vectorisation
    cloud_size: int  # points in each cloud it was trained on
    teacher: str  # hash of the weights whose embeddings it was trained on
    fidelity: Fidelity

    def to_bytes(self) -> bytes:
        """Writes weights and description in the safetensors format."""
        description = {
            "width": self.network.width,
            "pooling": self.network.pooling,
            "vectorisation": to_json(self.vectorisation),
            "cloud_size": self.cloud_size,
            "teacher": self.teacher,
            "fidelity": asdict(self.fidelity),
        }
        return save(self.network.state_dict(), {"ripsnet": json.dumps(description)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Approximation:
        """Reads what :meth:`to_bytes` wrote.

        Raises:
            ValueError: If it is something else.
        """
        try:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            about = json.loads(header["__metadata__"]["ripsnet"])
            vectorisation = from_json(about["vectorisation"])
            network = RipsNet(about["width"], vectorisation.size, pooling=about["pooling"])
            network.load_state_dict(load(content))
            judged = Fidelity(**about["fidelity"])
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"this is no RipsNet that topkd has written ({error!r})") from error
        network.eval().requires_grad_(False)
        return cls(network, vectorisation, about["cloud_size"], about["teacher"], judged)
