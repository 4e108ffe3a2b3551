"""Vectorizations that are fitted to a teacher's clouds, and approximators trained on them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from topkd.losses._pretraining import SaveState, fit_once
from topkd.losses.base import LossContext
from topkd.topology import Diagrams, length_scale, rips
from topkd.topology.approximation import (
    MIN_R2,
    NETWORKS,
    Approximation,
    Exact,
    Name,
    Training,
    cut_clouds,
    fidelity,
    train,
)
from topkd.topology.scaling import DiagramScale, TreeScale
from topkd.topology.vectorization import vectorization_type

HELD_OUT = 256  # minimum number of held-out clouds


def fit(diagrams: Diagrams, form: str, dimension: int, scale: TreeScale | None) -> Exact:
    """Fits a vectorization to diagrams of the teacher.

    Args:
        diagrams: Diagrams of all dimensions up to ``dimension``.
        form: Name of the vectorization.
        dimension: Dimension that is vectorized.
        scale: Scale of lengths, a statistic of H0. Defaults to that of the vectorization.

    Raises:
        ValueError: If the form is unknown, or all bars have length zero.
    """
    kind = vectorization_type(form)
    scale = scale or kind.default_scale
    if dimension == 0:
        return Exact(kind.fit_dimension(diagrams.of(0), 0, scale=scale))
    scaled = diagrams.scaled(1 / length_scale(diagrams.of(0), scale)).of(dimension)
    return Exact(kind.fit_dimension(scaled, dimension, scale="none"), dimension, scale)


def scale_of(exact: Exact) -> DiagramScale:
    """Returns the scale that was passed to :func:`fit`."""
    return exact.scale if exact.dimension > 0 else exact.vectorization.scale


def learn(
    context: LossContext,
    size: int,
    form: str,
    network: Name,
    training: Training,
    dimension: int = 0,
    scale: TreeScale | None = None,
) -> Approximation:
    """Trains an approximator on clouds of teacher embeddings, or loads it if it was trained before.

    The embeddings of ``training.passes`` augmented passes are kept in memory, 4 d bytes per image
    and pass. Each epoch cuts them into new clouds. One image in ten (at least two clouds) is held
    out: its clouds select the best epoch and measure the fidelity.

    Args:
        context: Training images with the teacher's features, and the folder of the result.
        size: Points per cloud.
        form: Vectorization that the network approximates.
        network: "ripsnet" or "distancenet".
        training: Training settings.
        dimension: Homology dimension.
        scale: Length scale, see :func:`fit`.

    Raises:
        ValueError: If there are too few training images, or no bar has positive length.
    """
    scale = scale or vectorization_type(form).default_scale
    settings = [size, form, asdict(training), dimension, scale]

    def fit_approximator(resumed: dict[str, Any] | None, save_state: SaveState) -> bytes:
        stream = _Clouds(context, size, training.passes)
        first, held_out = stream.training(0), stream.held_out()
        exact = fit(rips(first, max_dim=dimension), form, dimension, scale)
        title = {"ripsnet": "RipsNet", "distancenet": "DistanceNet"}[network]
        with context.progress.bar(title, training.length(network), "epochs") as advance:
            if resumed is not None:
                advance(resumed["epoch"], "")

            def after_epoch(epoch: int, error: float, reached: dict[str, Any]) -> None:
                is_tenth = epoch % 10 == 0
                advance(1, f"epoch {epoch}, held-out error {error:.5f}" if is_tenth else "")
                if is_tenth:
                    save_state(reached)

            trained = train(
                stream.training,
                held_out,
                exact,
                training,
                network=network,
                state=resumed,
                after_epoch=after_epoch,
            )
        measured = fidelity(trained, exact, first, held_out)
        context.progress.say(f"{title}: {measured}")
        if measured.r2 < MIN_R2:
            context.progress.say(
                f"warning: this {title} explains {max(measured.r2, 0):.0%} of the variance between "
                "clouds; `via: exact` is exact and faster"
            )
        width = first.shape[-1]
        return Approximation(trained, exact, size, width, context.teacher_hash, measured).to_bytes()

    return Approximation.from_bytes(fit_once(context, network, settings, fit_approximator))


class _Clouds:
    """Clouds of a teacher's embeddings, split anew in each epoch from augmented passes."""

    def __init__(self, context: LossContext, size: int, passes: int) -> None:
        if context.images < 3 * size:
            raise ValueError(
                f"{context.images} training images are too few for an approximator: it needs "
                f"clouds of {size} to train on and two more for evaluation; use `via: exact`"
            )
        self.size = size
        self.passes = []
        with context.progress.bar("Clouds", passes * context.images, "images") as advance:
            for epoch in range(passes):
                index, embeddings = [], []
                for batch, features in context.teacher_batches(epoch):
                    index.append(batch.index)
                    embeddings.append(features.embedding)
                    advance(len(batch.index), "")
                self.passes.append((torch.cat(index), torch.cat(embeddings)))
        order = torch.randperm(context.images, generator=torch.Generator().manual_seed(0))
        self.is_held_out = torch.zeros(context.images, dtype=torch.bool)
        self.is_held_out[order[: max(context.images // 10, 2 * size)]] = True

    def training(self, epoch: int) -> Tensor:
        """Clouds without held-out images, (clouds, n, d)."""
        return torch.cat(
            [
                cut_clouds(
                    embeddings[~self.is_held_out[index]],
                    self.size,
                    torch.Generator().manual_seed(epoch * len(self.passes) + number),
                )
                for number, (index, embeddings) in enumerate(self.passes)
            ]
        )

    def held_out(self) -> Tensor:
        """Clouds of held-out images, at least 256, (clouds, n, d)."""
        generator = torch.Generator().manual_seed(0)
        clouds: list[Tensor] = []
        while sum(map(len, clouds)) < HELD_OUT:
            index, embeddings = self.passes[len(clouds) % len(self.passes)]
            clouds.append(cut_clouds(embeddings[self.is_held_out[index]], self.size, generator))
        return torch.cat(clouds)


def check_fit(
    approximation: Approximation,
    file: str,
    teacher: str,
    size: int,
    dimension: int,
    scale: TreeScale | None,
) -> None:
    """Validates that an approximator matches the loss.

    Raises:
        ValueError: If it was trained for another dimension, scale, teacher or cloud size.
    """
    exact = approximation.exact
    if exact.dimension != dimension:
        raise ValueError(
            f"{file} was trained for dimension {exact.dimension}, not for dimension: {dimension}"
        )
    if scale not in (None, scale_of(exact)):
        raise ValueError(f"{file} was trained at scale: {scale_of(exact)}, not at scale: {scale}")
    if approximation.teacher != teacher:
        raise ValueError(
            f"{file} was trained for another teacher, {approximation.teacher[:8]}, "
            f"not for {teacher[:8]}"
        )
    if approximation.cloud_size != size:
        raise ValueError(
            f"{file} was trained for clouds of {approximation.cloud_size} points, "
            f"not for batches of {size}"
        )


def check_kind(approximation: Approximation, file: str, network: Name, form: str | None) -> None:
    """Validates that an approximator is the network, and has the vectorization, of the loss.

    Args:
        approximation: The approximator.
        file: Its file, for messages.
        network: "ripsnet" or "distancenet".
        form: Name of the vectorization; None accepts any.

    Raises:
        ValueError: If it is another network, or was trained for another vectorization.
    """
    found = next(n for n, kind in NETWORKS.items() if isinstance(approximation.network, kind))
    if found != network:
        raise ValueError(f"{file} holds a {found}, not via: {network}")
    name = approximation.exact.vectorization.name
    if form not in (None, name):
        raise ValueError(f"{file} was trained for form: {name}, not for form: {form}")
