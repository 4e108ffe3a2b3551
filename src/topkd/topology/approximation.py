"""Approximators of exact persistence: how they are trained, how well they do, and their files."""

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

from topkd.topology.distancenet import DistanceNet
from topkd.topology.rips import rips
from topkd.topology.ripsnet import Pooling, RipsNet
from topkd.topology.scaling import Unit, length_unit, told_in
from topkd.topology.serialization import Vectorization, from_json, to_json

Approximator = RipsNet | DistanceNet
Name = Literal["ripsnet", "distancenet"]

MIN_R2 = 0.5  # below this R², an approximator is reported as too inaccurate
NETWORKS: dict[Name, type[Approximator]] = {"ripsnet": RipsNet, "distancenet": DistanceNet}


@dataclass(frozen=True)
class Exact:
    """What an approximator stands for: a vectorization of the exact diagram of one dimension."""

    vectorization: Vectorization
    dimension: int = 0
    unit: Unit = "none"
    """Of all lengths, before any of the vectorization's own: a statistic of the deaths of H0, which
    loops, few as they are, are better told in."""

    def __call__(self, points: Tensor) -> Tensor:
        """Describes one cloud (n, d) or several (clouds, n, d)."""
        diagrams = rips(points, max_dim=self.dimension)
        if self.unit != "none":
            diagrams = told_in(diagrams, length_unit(diagrams.of(0), self.unit))
        return self.vectorization(diagrams.of(self.dimension))

    @property
    def sees_scale(self) -> bool:
        """Whether a cloud and a larger copy of it differ."""
        return self.unit == self.vectorization.unit == "none"


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
    """How an approximator is trained.

    What is not told is, for RipsNet, the paper's, but for passes and epochs.
    """

    passes: int = 8  # augmented passes over the training images that make one epoch of clouds
    epochs: int | None = None  # 300 for RipsNet, 40 for DistanceNet
    patience: int = 50  # epochs without improvement on the held-out clouds
    lr: float | None = None  # 5e-4 for RipsNet; 1e-2 for DistanceNet, falling to 0
    clouds_per_step: int | None = None  # 64 for RipsNet, 16 for DistanceNet
    pooling: Pooling | None = None  # of RipsNet alone; the mean, if not told

    def length(self, network: Name) -> int:
        """Epochs, at most."""
        usual = {"ripsnet": 300, "distancenet": 40}[network]
        return usual if self.epochs is None else self.epochs

    def step(self, network: Name) -> int:
        """Clouds for each step."""
        usual = {"ripsnet": 64, "distancenet": 16}[network]
        return usual if self.clouds_per_step is None else self.clouds_per_step

    def rate(self, network: Name, epoch: int) -> float:
        """Learning rate in an epoch, counted from 1."""
        if network == "ripsnet":
            return 5e-4 if self.lr is None else self.lr
        start = 1e-2 if self.lr is None else self.lr
        return start * (1 - (epoch - 1) / self.length(network))

    def build(self, network: Name, clouds: Tensor, exact: Exact) -> Approximator:
        """Makes the network for such clouds, (clouds, n, d).

        Raises:
            ValueError: If pooling is told to a network that has no choice.
        """
        _, n, width = clouds.shape
        outputs = exact.vectorization.size
        if network == "ripsnet":
            return RipsNet(width, outputs, pooling=self.pooling or "mean")
        if self.pooling is not None:
            raise ValueError(f"pooling is an option of ripsnet; {network} has no choice")
        built = DistanceNet(outputs, neighbors=min(16, n - 1), sees_scale=exact.sees_scale)
        built.standardize(clouds, exact(clouds))
        return built


def cut_clouds(embeddings: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Shuffles embeddings (images, d) and cuts them into clouds (clouds, size, d); drops a rest."""
    order = torch.randperm(len(embeddings), generator=generator)
    order = order[: len(order) - len(order) % size]
    return embeddings[order].view(-1, size, embeddings.shape[-1])


def train(
    stream: Callable[[int], Tensor],
    held_out: Tensor,
    exact: Exact,
    training: Training,
    *,
    network: Name = "ripsnet",
    seed: int = 0,
    state: dict[str, Any] | None = None,
    after_epoch: Callable[[int, float, dict[str, Any]], None] = lambda epoch, error, state: None,
) -> Approximator:
    """Trains an approximator by Adamax on the mean squared error, and keeps the best on held-out.

    Args:
        stream: Epoch -> clouds (clouds, n, d), a function of the epoch alone. The exact vectors
            they are compared with are made here, in microseconds a cloud.
        held_out: Clouds that never are in the stream, (clouds, n, d).
        exact: What the network learns to guess; for RipsNet, at most 1.
        training: How long and at which rate.
        network: Which it is.
        seed: Of the weights at the start and of the order of the clouds.
        state: As ``after_epoch`` was given it, to go on from there to the same result.
        after_epoch: Called with the epoch, the held-out error and the state, which changes with the
            next step: copy or write it at once.

    Returns:
        The network, in eval mode and without gradients.
    """
    clouds, truth = stream(1), exact(held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = training.build(network, clouds, exact)
    optimizer = torch.optim.Adamax(built.parameters())
    best, best_error, best_epoch, first = copy.deepcopy(built.state_dict()), math.inf, 0, 1
    if state is not None:
        built.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        best, best_error, best_epoch = state["best"], state["best_error"], state["best_epoch"]
        first = state["epoch"] + 1
    for epoch in range(first, training.length(network) + 1):
        if epoch - best_epoch > training.patience:
            break
        clouds = stream(epoch)
        vectors = exact(clouds)
        order = torch.randperm(len(clouds), generator=torch.Generator().manual_seed(seed + epoch))
        optimizer.param_groups[0]["lr"] = training.rate(network, epoch)
        for step in order.split(training.step(network)):
            optimizer.zero_grad()
            F.mse_loss(built(clouds[step]), vectors[step]).backward()
            optimizer.step()
        with torch.no_grad():
            error = F.mse_loss(built(held_out), truth).item()
        if error < best_error - 1e-10:
            best, best_error, best_epoch = copy.deepcopy(built.state_dict()), error, epoch
        after_epoch(
            epoch,
            error,
            {
                "network": built.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best": best,
                "best_error": best_error,
                "best_epoch": best_epoch,
                "epoch": epoch,
            },
        )
    built.load_state_dict(best)
    return built.eval().requires_grad_(False)


def fidelity(network: nn.Module, exact: Exact, clouds: Tensor, held_out: Tensor) -> Fidelity:
    r"""Measures how well a network stands for exact persistence.

    .. math:: R^2 = 1 - \frac{\sum_X \lVert R(X) - V(X) \rVert^2}
        {\sum_X \lVert \bar V - V(X) \rVert^2}

    over held-out clouds, where V is exact and :math:`\bar V` its mean over training clouds; and
    the cosine between the gradients of :math:`\mathrm{MSE}(R(X), R(Y))` and of
    :math:`\mathrm{MSE}(V(X), V(Y))` with respect to the points of Y, for neighboring X and Y.

    Args:
        network: The approximator R.
        exact: The exact V.
        clouds: Training clouds, (clouds, n, d).
        held_out: Held-out clouds, at least two, (clouds, n, d).
    """
    with torch.no_grad():
        truth, guess = exact(held_out), network(held_out)
        mean = exact(clouds).mean(0)
    r2 = 1 - (guess - truth).square().sum() / (mean - truth).square().sum()

    moved = held_out.roll(1, 0).clone().requires_grad_()
    losses = (
        (network(moved) - guess).square().mean(-1).sum(),
        (exact(moved) - truth).square().mean(-1).sum(),
    )
    guessed, true = (torch.autograd.grad(loss, moved)[0].flatten(1).double() for loss in losses)
    lengths = guessed.norm(dim=1) * true.norm(dim=1)
    active = lengths > 0
    cosines = (guessed * true).sum(1)[active] / lengths[active]
    low, median = (
        cosines.quantile(torch.tensor([0.1, 0.5]).double()).tolist() if len(cosines) else (0.0, 0.0)
    )
    return Fidelity(r2.item(), median, low, len(held_out), int((~active).sum()))


@dataclass(frozen=True)
class Approximation:
    """A trained network with all that is needed to use it again."""

    network: Approximator
    exact: Exact  # what it stands for
    cloud_size: int  # points in each cloud it was trained on
    width: int  # of these points
    teacher: str  # hash of the weights whose embeddings it was trained on
    fidelity: Fidelity

    def to_bytes(self) -> bytes:
        """Writes weights and description in the safetensors format."""
        name = next(name for name, kind in NETWORKS.items() if isinstance(self.network, kind))
        description = {
            "network": name,
            "settings": self.network.settings,
            "vectorization": to_json(self.exact.vectorization),
            "dimension": self.exact.dimension,
            "unit": self.exact.unit,
            "cloud_size": self.cloud_size,
            "width": self.width,
            "teacher": self.teacher,
            "fidelity": asdict(self.fidelity),
        }
        return save(self.network.state_dict(), {"approximation": json.dumps(description)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Approximation:
        """Reads what :meth:`to_bytes` wrote.

        Raises:
            ValueError: If it is something else.
        """
        try:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            about = json.loads(header["__metadata__"]["approximation"])
            vectorization = from_json(about["vectorization"])
            exact = Exact(vectorization, about["dimension"], about.get("unit", "none"))
            network = NETWORKS[about["network"]](**about["settings"])
            network.load_state_dict(load(content))
            judged = Fidelity(**about["fidelity"])
            facts = about["cloud_size"], about["width"], about["teacher"]
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"this is no approximator that topkd has written ({error!r})"
            ) from error
        return cls(network.eval().requires_grad_(False), exact, *facts, judged)
