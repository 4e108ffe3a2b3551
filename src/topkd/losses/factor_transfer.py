"""Factor transfer: a loss on compressed representations of the last feature map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from topkd._runtime import processes
from topkd.features import Batch, Features
from topkd.losses._pretraining import SaveState, fit_once
from topkd.losses._validation import MAPS, check_shapes, count, one_of, positive
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import paired, to_smaller
from topkd.losses.regression import mean_square
from topkd.topology.gradient import SMALL, bounded_divide

NEGATIVE_SLOPE = 0.1  # of the leaky ReLUs

Form = Literal["map", "whole"]


def factor_transfer(student: Tensor, teacher: Tensor, *, form: Form = "map") -> Tensor:
    r"""Compares the factors of two networks after normalization.

    .. math:: \frac{1}{nm} \sum_i \Big\lVert \frac{q^s_i}{\lVert q^s_i \rVert_2} -
        \frac{q^t_i}{\lVert q^t_i \rVert_2} \Big\rVert_1

    for n images and m entries in each q. ``form="map"`` follows RepDistiller: q is the mean over
    channels of the squared factor, one value per position. ``form="whole"`` follows the paper: q is
    the factor itself; the paper writes a sum, the authors' code computes a mean. (torchdistill
    divides by n once more.) The larger factor is average-pooled to the size of the smaller.

    Args:
        student: Factor of the student, (n, k, h, w).
        teacher: Factor of the teacher, (n, k, h, w); the size may differ.
        form: "map" or "whole".

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the factors differ in images or channels, or the form is unknown.

    References:
        Paraphrasing Complex Network: Network Compression via Factor Transfer (Kim et al., NeurIPS
        2018) https://arxiv.org/abs/1802.04977

    Examples:
        >>> left, right = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
        >>> left[..., 0], right[..., 1] = 1.0, -7.0
        >>> factor_transfer(left, right).item()
        1.0
    """
    check_shapes("factors", student, teacher, 2, MAPS)
    one_of("form", form, Form)
    factors = to_smaller(student, teacher)
    small = SMALL**2 if form == "map" else SMALL
    rows = [(f.square().mean(1) if form == "map" else f).flatten(1) for f in factors]
    s, t = (bounded_divide(q, q.norm(dim=1, keepdim=True), small) for q in rows)
    return F.l1_loss(s, t)


def encoder(channels: int, factors: int, *, normalized: bool) -> nn.Sequential:
    """Builds an encoder from maps (n, c, h, w) to factors (n, k, h, w): three 3x3 convolutions.

    Args:
        channels: Channels c of the map.
        factors: Channels k of the factors.
        normalized: Whether a batch normalization follows each convolution.

    Examples:
        >>> encoder(8, 4, normalized=True)(torch.zeros(2, 8, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """
    widths = [(channels, channels), (channels, factors), (factors, factors)]
    return _chain([nn.Conv2d(a, b, 3, padding=1) for a, b in widths], normalized)


def _chain(
    convolutions: Sequence[nn.Conv2d | nn.ConvTranspose2d], normalized: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for convolution in convolutions:
        nn.init.kaiming_normal_(
            convolution.weight, a=NEGATIVE_SLOPE
        )  # torch's default decays over six layers
        nn.init.zeros_(cast(Tensor, convolution.bias))
        normalization = [nn.BatchNorm2d(convolution.out_channels)] if normalized else []
        layers += [convolution, *normalization, nn.LeakyReLU(NEGATIVE_SLOPE)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """An autoencoder of feature maps: (n, c, h, w) to factors (n, k, h, w) and back.

    Args:
        channels: Channels c of the maps.
        factors: Channels k of the factors.

    References:
        Paraphrasing Complex Network: Network Compression via Factor Transfer (Kim et al., NeurIPS
        2018) https://arxiv.org/abs/1802.04977

    Examples:
        >>> Paraphraser(8, 4).encoder(torch.zeros(2, 8, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encoder = encoder(channels, factors, normalized=False)
        widths = [(factors, factors), (factors, channels), (channels, channels)]
        convolutions = [nn.ConvTranspose2d(a, b, 3, padding=1) for a, b in widths]
        self.decoder = _chain(convolutions, normalized=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.decoder(self.encoder(maps))


class FT(Loss):
    """:func:`factor_transfer` of the last maps, FT.

    The teacher's factors are the codes of a :class:`Paraphraser`, an autoencoder of its last map
    that is pre-trained on the teacher alone. The student's factors are computed by a translator:
    the same encoder with batch normalizations, trained together with the student.

    Args:
        form: "map", as in RepDistiller, or "whole", as in the paper.
        rate: Ratio of factor channels to channels of the teacher's last map.
        epochs: Epochs of pre-training.
        lr: Learning rate of pre-training.

    Raises:
        ValueError: If an option is out of range.

    References:
        Paraphrasing Complex Network: Network Compression via Factor Transfer (Kim et al., NeurIPS
        2018) https://arxiv.org/abs/1802.04977

    Examples:
        >>> FT(rate=0.5, epochs=10).options["rate"]
        0.5
    """

    info = LossInfo(
        name="ft",
        group="feature maps",
        compares="factors of the last feature map",
        paper="Kim et al., NeurIPS 2018",
        url="https://arxiv.org/abs/1802.04977",
        cost="n d k with k channels, six 3x3 convolutions and a pre-trained autoencoder",
        zero=False,
    )

    reads_maps = True

    def __init__(
        self, *, form: Form = "map", rate: float = 0.5, epochs: int = 30, lr: float = 0.01
    ) -> None:
        super().__init__()
        self.form = one_of("form", form, Form)
        self.rate, self.lr = positive("rate", rate), positive("lr", lr)
        self.epochs = count("epochs", epochs)
        self._metadata: dict[str, Any] = {}

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Trains the paraphraser, or loads it, and creates the translator.

        Raises:
            ValueError: If one of the networks has no map, or the paraphraser diverges.
        """
        ((student_map, teacher_map),) = paired(student.maps[-1:], teacher.maps[-1:])
        channels = teacher_map.shape[1]
        factors = max(1, int(self.rate * channels))
        paraphraser, error = processes.by_first(
            lambda: learn(context, channels, factors, epochs=self.epochs, lr=self.lr)
        )
        self.paraphrase = paraphraser.encoder.requires_grad_(False)
        self.translate = encoder(student_map.shape[1], factors, normalized=True)
        self._metadata = {"factors": factors, "reconstruction_error": error}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        s, t = self.translate(student.maps[-1]), self.paraphrase(teacher.maps[-1])
        return factor_transfer(s, t, form=self.form)

    def metadata(self) -> dict[str, Any]:
        """Returns the number of factors and the reconstruction error of the paraphraser."""
        return self._metadata


def learn(
    context: LossContext, channels: int, factors: int, *, epochs: int, lr: float
) -> tuple[Paraphraser, float]:
    """Trains a paraphraser of the teacher's last maps, or loads it if it was trained before.

    The optimizer is SGD with momentum 0.9 and weight decay 5e-4, and the objective is the mean
    squared error. The training state is saved after each epoch; an interrupted training resumes
    from it.

    Args:
        context: Training images with the teacher's features, and the folder of the result.
        channels: Channels of the teacher's last map.
        factors: Channels of the factors.
        epochs: Passes over the augmented training images.
        lr: Learning rate.

    Returns:
        The paraphraser, and its reconstruction error in the last epoch: the squared error divided
        by the squared norm of the maps.

    Raises:
        ValueError: If the error becomes NaN or infinite.
    """
    with torch.random.fork_rng(devices=[]):  # the translator's weights must not depend on this
        torch.manual_seed(0)
        network = Paraphraser(channels, factors)

    def fit(resumed: dict[str, Any] | None, save_state: SaveState) -> bytes:
        error = _train(network, context, resumed, save_state, epochs, lr)
        context.progress.say(f"Paraphraser: reconstruction error {error:.1%}")
        weights = network.cpu().state_dict() | {"error": torch.tensor(error, dtype=torch.float64)}
        return save(weights)

    weights = load(fit_once(context, "paraphraser", [channels, factors, epochs, lr], fit))
    error = weights.pop("error").item()
    network.load_state_dict(weights)
    return network.eval(), error


def _train(
    network: Paraphraser,
    context: LossContext,
    resumed: dict[str, Any] | None,
    save_state: SaveState,
    epochs: int,
    lr: float,
) -> float:
    """Trains a paraphraser from scratch or from a saved state; returns its last epoch's error."""
    if context.teacher is not None:  # the maps are large: train on the teacher's device
        network.to(next(context.teacher.network.parameters()).device)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    first, error = 0, math.nan
    if resumed is not None:
        network.load_state_dict(resumed["network"])
        optimizer.load_state_dict(resumed["optimizer"])
        first, error = resumed["epoch"], resumed["error"]
    with context.progress.bar("Paraphraser", epochs * context.images, "images") as advance:
        advance(first * context.images, "")
        for epoch in range(first, epochs):
            error = _epoch(network, optimizer, context, epoch, advance)
            advance(0, f"epoch {epoch + 1}, reconstruction error {error:.1%}")
            if not math.isfinite(error):
                raise ValueError(f"the paraphraser diverged at lr {lr}; use a smaller one")
            save_state(
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "epoch": epoch + 1,
                    "error": error,
                }
            )
    return error


def _epoch(
    network: Paraphraser,
    optimizer: torch.optim.Optimizer,
    context: LossContext,
    epoch: int,
    advance: Callable[[int, str], None],
) -> float:
    """Trains for one pass over the images and returns the reconstruction error of the pass."""
    device = next(network.parameters()).device
    squared_error, squared_norm = torch.zeros((), device=device), torch.zeros((), device=device)
    for batch, features in context.teacher_batches(epoch):
        maps = features.maps[-1].to(device)
        error = mean_square(network(maps), maps)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        squared_error += error.detach() * len(maps)
        squared_norm += maps.square().mean() * len(maps)
        advance(len(batch.index), "")
    return (squared_error / squared_norm).item()
