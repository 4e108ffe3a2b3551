"""Vectorizations fitted to a teacher's clouds, and networks that approximate them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from topkd.losses._pretraining import SaveState, fit_once
from topkd.losses.base import LossContext
from topkd.topology import Diagrams, PersistenceImage, PersistenceVector, length_unit, rips
from topkd.topology.approximation import (
    MIN_R2,
    Approximation,
    Exact,
    Name,
    Training,
    cut_clouds,
    fidelity,
    train,
)
from topkd.topology.scaling import Unit
from topkd.topology.serialization import Form

HELD_OUT = 256  # minimum number of held-out clouds


def fit(diagrams: Diagrams, form: Form, dimension: int, scale: Unit | None) -> Exact:
    """Fits a vectorization to diagrams of the teacher.

    Args:
        diagrams: Diagrams of all dimensions up to ``dimension``.
        form: "vector" or "image".
        dimension: Homology dimension to vectorize.
        scale: Length scale of each cloud, a statistic of its H0 deaths. Defaults to the mean for
            vectors and to none for images.

    Returns:
        The exact vectorization.

    Raises:
        ValueError: If no bar has positive length.
    """
    unit: Unit = scale or ("mean" if form == "vector" else "none")
    scaled = diagrams.scaled(1 / length_unit(diagrams.of(0), unit)).of(dimension)
    if dimension > 0:
        loops = (
            PersistenceVector.fit(scaled, unit="none")
            if form == "vector"
            else PersistenceImage.fit_cells(scaled)
        )
        return Exact(loops, dimension, unit)
    if form == "vector":
        return Exact(PersistenceVector.fit(diagrams, unit=unit))
    return Exact(replace(PersistenceImage.fit(scaled), unit=unit))


def scale_of(exact: Exact) -> Unit:
    """Returns the length scale of a vectorization that :func:`fit` returned."""
    return exact.unit if exact.dimension > 0 else exact.vectorization.unit


def learn(
    context: LossContext,
    size: int,
    form: Form,
    network: Name,
    training: Training,
    dimension: int = 0,
    scale: Unit | None = None,
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
                f"warning: this {title} explains {max(measured.r2, 0):.0%} of what differs between "
                "clouds; `via: exact` explains all of it and is faster"
            )
        width = first.shape[-1]
        return Approximation(trained, exact, size, width, context.teacher_hash, measured).to_bytes()

    return Approximation.from_bytes(fit_once(context, network, settings, fit_approximator))


class _Clouds:
    """Clouds of teacher embeddings, cut anew in each epoch from several augmented passes."""

    def __init__(self, context: LossContext, size: int, passes: int) -> None:
        if context.images < 3 * size:
            raise ValueError(
                f"{context.images} training images are too few for an approximator: it needs "
                f"clouds of {size} for training and two held-out ones; use `via: exact`"
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
        """Cuts training clouds from the images that are not held out, (clouds, n, d)."""
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
        """Cuts at least 256 clouds from the held-out images, (clouds, n, d)."""
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
    scale: Unit | None,
) -> None:
    """Checks that an approximator was made for this teacher, cloud size, dimension and scale.

    Args:
        approximation: The approximator.
        file: Name of its file, for messages.
        teacher: Hash of the teacher.
        size: Points per cloud.
        dimension: Homology dimension.
        scale: Length scale; None accepts any.

    Raises:
        ValueError: If it was not; the message names the file.
    """
    exact = approximation.exact
    if exact.dimension != dimension:
        raise ValueError(
            f"{file} approximates dimension {exact.dimension}, here it is dimension: {dimension}"
        )
    if scale not in (None, scale_of(exact)):
        raise ValueError(f"{file} has scale: {scale_of(exact)}, here it is scale: {scale}")
    if approximation.teacher != teacher:
        raise ValueError(
            f"{file} was made for another teacher: its hash is {approximation.teacher[:8]}, "
            f"this one is {teacher[:8]}"
        )
    if approximation.cloud_size != size:
        raise ValueError(
            f"{file} was made for clouds of {approximation.cloud_size} points, "
            f"the batches here have {size}"
        )
