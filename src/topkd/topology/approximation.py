"""Neural approximators of persistence: training, fidelity and files."""

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
from topkd.topology.scaling import TreeScale, length_scale, normalized
from topkd.topology.serialization import from_json, to_json
from topkd.topology.vectorization import Vectorization

Approximator = RipsNet | DistanceNet
Name = Literal["ripsnet", "distancenet"]

MIN_R2 = 0.5  # below this R², an approximator is reported as too inaccurate
NETWORKS: dict[Name, type[Approximator]] = {"ripsnet": RipsNet, "distancenet": DistanceNet}


@dataclass(frozen=True)
class Exact:
    """Exact target of an approximator: the vectorized diagram of one dimension."""

    vectorization: Vectorization
    dimension: int = 0
    scale: TreeScale = "none"
    """Scale of all lengths, applied before that of the vectorization. It is a statistic of H0,
    because loops are few and their deaths vary."""

    def __call__(self, points: Tensor) -> Tensor:
        """Vectorizes one cloud (n, d) or several (clouds, n, d)."""
        diagrams = rips(points, max_dim=self.dimension)
        if self.scale != "none":
            diagrams = normalized(diagrams, length_scale(diagrams.of(0), self.scale))
        return self.vectorization(diagrams.of(self.dimension))

    @property
    def is_scale_invariant(self) -> bool:
        """Whether a cloud and a larger copy of it have the same vector."""
        return not self.scale == self.vectorization.scale == "none"


@dataclass(frozen=True)
class Fidelity:
    """Accuracy of an approximator on held-out clouds.

    A network that always predicts the mean vector of the training clouds has R² = 0.
    """

    r2: float
    gradient_cosine: float  # with the exact gradient, median over pairs of clouds
    gradient_cosine_low: float  # 10 % quantile over pairs
    clouds: int
    silent: int  # pairs excluded from the cosines, because one of the gradients is 0

    def __str__(self) -> str:
        return (
            f"R² {self.r2:.2f} on {self.clouds} held-out clouds, cosine with the exact gradient "
            f"{self.gradient_cosine:.2f} (10 % below {self.gradient_cosine_low:.2f})"
        )


@dataclass(frozen=True)
class Training:
    """Training options of an approximator.

    Defaults for RipsNet are the paper's, except for passes and epochs.
    """

    passes: int = 8  # augmented passes over the training images per epoch of clouds
    epochs: int | None = None  # 300 for RipsNet, 40 for DistanceNet
    patience: int = 50  # epochs without improvement on the held-out clouds
    lr: float | None = None  # 5e-4 for RipsNet; 1e-2 for DistanceNet, falling to 0
    clouds_per_step: int | None = None  # 64 for RipsNet, 16 for DistanceNet
    pooling: Pooling | None = None  # RipsNet only; defaults to the mean

    def length(self, network: Name) -> int:
        """Returns the maximum number of epochs."""
        default = {"ripsnet": 300, "distancenet": 40}[network]
        return default if self.epochs is None else self.epochs

    def step(self, network: Name) -> int:
        """Returns the number of clouds per step."""
        default = {"ripsnet": 64, "distancenet": 16}[network]
        return default if self.clouds_per_step is None else self.clouds_per_step

    def rate(self, network: Name, epoch: int) -> float:
        """Returns the learning rate in an epoch, counted from 1."""
        if network == "ripsnet":
            return 5e-4 if self.lr is None else self.lr
        start = 1e-2 if self.lr is None else self.lr
        return start * (1 - (epoch - 1) / self.length(network))

    def build(self, network: Name, clouds: Tensor, exact: Exact) -> Approximator:
        """Creates the network for clouds (clouds, n, d).

        Raises:
            ValueError: If pooling is set for a network without this option.
        """
        _, n, width = clouds.shape
        outputs = exact.vectorization.size
        if network == "ripsnet":
            return RipsNet(width, outputs, pooling=self.pooling or "mean")
        if self.pooling is not None:
            raise ValueError(f"pooling is an option of ripsnet, not of {network}")
        model = DistanceNet(
            outputs, neighbors=min(16, n - 1), scale_aware=not exact.is_scale_invariant
        )
        model.standardize(clouds, exact(clouds))
        return model


def cut_clouds(embeddings: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Shuffles embeddings (images, d) and splits them into clouds (clouds, size, d)."""
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
    """Trains an approximator with Adamax on the mean squared error; keeps the best epoch.

    Args:
        stream: Epoch -> training clouds (clouds, n, d), a function of the epoch only. Their exact
            vectors are computed on the fly, in microseconds per cloud.
        held_out: Clouds that are not in the stream, (clouds, n, d); they select the best epoch.
        exact: Regression target; for RipsNet, its values must be at most 1.
        training: Training options.
        network: Architecture.
        seed: Seed of the initial weights and of the order of the clouds.
        state: A state passed to ``after_epoch``, to resume from; the result is the same.
        after_epoch: Called with the epoch, the held-out error and the training state. The state is
            updated in place by the next step, so copy or save it immediately.

    Returns:
        The network, in eval mode and frozen.
    """
    clouds, truth = stream(1), exact(held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = training.build(network, clouds, exact)
    optimizer = torch.optim.Adamax(model.parameters())
    best, best_error, best_epoch, first = copy.deepcopy(model.state_dict()), math.inf, 0, 1
    if state is not None:
        model.load_state_dict(state["network"])
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
            F.mse_loss(model(clouds[step]), vectors[step]).backward()
            optimizer.step()
        with torch.no_grad():
            error = F.mse_loss(model(held_out), truth).item()
        if error < best_error - 1e-10:
            best, best_error, best_epoch = copy.deepcopy(model.state_dict()), error, epoch
        after_epoch(
            epoch,
            error,
            {
                "network": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best": best,
                "best_error": best_error,
                "best_epoch": best_epoch,
                "epoch": epoch,
            },
        )
    model.load_state_dict(best)
    return model.eval().requires_grad_(False)


def fidelity(network: nn.Module, exact: Exact, clouds: Tensor, held_out: Tensor) -> Fidelity:
    r"""Evaluates an approximator against exact persistence.

    .. math:: R^2 = 1 - \frac{\sum_X \lVert R(X) - V(X) \rVert^2}
        {\sum_X \lVert \bar V - V(X) \rVert^2}

    over held-out clouds, where V is the exact target and :math:`\bar V` its mean over training
    clouds. The gradient cosine compares the gradients of :math:`\mathrm{MSE}(R(X), R(Y))` and of
    :math:`\mathrm{MSE}(V(X), V(Y))` with respect to the points of Y, for consecutive clouds X, Y.

    Args:
        network: The approximator R.
        exact: The exact target V.
        clouds: Training clouds, (clouds, n, d).
        held_out: Held-out clouds, at least two, (clouds, n, d).
    """
    with torch.no_grad():
        truth, predicted = exact(held_out), network(held_out)
        mean = exact(clouds).mean(0)
    r2 = 1 - (predicted - truth).square().sum() / (mean - truth).square().sum()

    moved = held_out.roll(1, 0).clone().requires_grad_()
    losses = (
        (network(moved) - predicted).square().mean(-1).sum(),
        (exact(moved) - truth).square().mean(-1).sum(),
    )
    approximate, true = (torch.autograd.grad(loss, moved)[0].flatten(1).double() for loss in losses)
    lengths = approximate.norm(dim=1) * true.norm(dim=1)
    active = lengths > 0
    cosines = (approximate * true).sum(1)[active] / lengths[active]
    low, median = (
        cosines.quantile(torch.tensor([0.1, 0.5]).double()).tolist() if len(cosines) else (0.0, 0.0)
    )
    return Fidelity(r2.item(), median, low, len(held_out), int((~active).sum()))


@dataclass(frozen=True)
class Approximation:
    """A trained approximator and its metadata."""

    network: Approximator
    exact: Exact  # regression target
    cloud_size: int  # number of points per training cloud
    width: int  # dimension of the points
    teacher: str  # hash of the teacher's weights
    fidelity: Fidelity

    def to_bytes(self) -> bytes:
        """Serializes weights and metadata in the safetensors format."""
        name = next(name for name, kind in NETWORKS.items() if isinstance(self.network, kind))
        description = {
            "network": name,
            "settings": self.network.settings,
            "vectorization": to_json(self.exact.vectorization),
            "dimension": self.exact.dimension,
            "scale": self.exact.scale,
            "cloud_size": self.cloud_size,
            "width": self.width,
            "teacher": self.teacher,
            "fidelity": asdict(self.fidelity),
        }
        return save(self.network.state_dict(), {"approximation": json.dumps(description)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Approximation:
        """Reads the output of :meth:`to_bytes`.

        Raises:
            ValueError: If the content is not an approximator of this version.
        """
        try:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            about = json.loads(header["__metadata__"]["approximation"])
            vectorization = from_json(about["vectorization"])
            exact = Exact(vectorization, about["dimension"], about["scale"])
            network = NETWORKS[about["network"]](**about["settings"])
            network.load_state_dict(load(content))
            accuracy = Fidelity(**about["fidelity"])
            metadata = about["cloud_size"], about["width"], about["teacher"]
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"this is not an approximator file of this version of topkd ({error!r})"
            ) from error
        return cls(network.eval().requires_grad_(False), exact, *metadata, accuracy)
