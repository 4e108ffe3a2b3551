"""Losses on the shape of a batch of embeddings."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd import files
from topkd.features import Batch, Features
from topkd.losses.base import Loss, Source
from topkd.topology import rips
from topkd.topology.approximation import (
    Approximation,
    Exact,
    Name,
    Training,
    cut_clouds,
    fidelity,
    train,
)
from topkd.topology.stored import FORMS, Form, to_json

Via = Literal["exact", "ripsnet", "distancenet"]

FITTED_ON = 64  # clouds that range and scale of an exact vectorisation are read off
HELD_OUT = 256  # clouds, at least, by which an approximator is judged
WARN_BELOW = 0.5  # R² of an approximator


class TopKD(Loss):
    r"""Compares the global shape of a batch: the persistence of both clouds of embeddings.

    .. math:: \frac{1}{m} \lVert V(f^t) - V(f^s) \rVert^2

    where V describes the cloud that the n embeddings of the batch form by m numbers. It does not
    see which point is which image: the other terms have to say so.

    Args:
        describe: V, from a cloud (n, d) to (m,).
        project: Takes the student's embedding to the width that ``describe`` needs.
        facts: What readers of the results should know of V.

    References:
        Do Topological Characteristics Help in Knowledge Distillation? (Kim et al., ICML 2024)
        https://proceedings.mlr.press/v235/kim24aj.html

    Examples:
        >>> from topkd.topology import PersistenceVector
        >>> cloud = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> vector = PersistenceVector.fit(rips(cloud[None]))
        >>> loss = TopKD(lambda points: vector(rips(points)))
        >>> teacher = Features(torch.zeros(64, 10), cloud)
        >>> student = Features(torch.zeros(64, 10), cloud.flip(0))  # the same shape, permuted
        >>> batch = Batch(torch.zeros(64, 3, 8, 8), torch.zeros(64).long(), torch.arange(64))
        >>> loss(student, teacher, batch).item() < 1e-9
        True
    """

    def __init__(
        self,
        describe: Callable[[Tensor], Tensor],
        project: nn.Module | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.describe, self.project = describe, project
        self._facts = facts or {}

    @classmethod
    def between(  # type: ignore[override]  # its options are named
        cls,
        student: Features,
        teacher: Features,
        source: Source,
        *,
        via: Via = "exact",
        form: Form | None = None,
        training: Training = Training(),  # noqa: B008  (it is frozen)
        file: str | None = None,
    ) -> TopKD:
        """Builds the loss, learning from the teacher what it needs.

        Args:
            student: What the student makes of some batch.
            teacher: What the teacher makes of it.
            source: The teacher's answers to the training images.
            via: Whether persistence is computed exactly, guessed by a RipsNet, as in the paper, or
                guessed from distances by a DistanceNet, which guesses better.
            form: How a diagram is described, "vector" (20 numbers without scale) or "image" (the
                paper's 400 pixels). RipsNet guesses the image if not told, all else the vector.
            training: How the approximator is trained, if there is one.
            file: An approximator that was trained before, to be used instead of training one.

        Raises:
            ValueError: If the approximator in the file was made for another teacher or other
                clouds.
        """
        if via == "exact":
            clouds = [features.embedding for _, features in islice(source.answers(0), FITTED_ON)]
            exact = Exact(FORMS[form or "vector"].fit(rips(torch.stack(clouds))))
            return cls(exact, facts={"via": via, "vectorisation": to_json(exact.vectorisation)})
        size, width = teacher.embedding.shape
        if file is None:
            usual: Form = "image" if via == "ripsnet" else "vector"
            approximation = learn(source, size, form or usual, via, training)
        else:
            approximation = Approximation.from_bytes(Path(file).read_bytes())
            _check_fit(approximation, file, source.teacher_hash, size)
        own_width, project = student.embedding.shape[1], None
        if own_width != width and approximation.network.width is not None:
            project = nn.Linear(own_width, width)
        facts = {
            "via": via,
            "vectorisation": to_json(approximation.exact.vectorisation),
            "fidelity": asdict(approximation.fidelity),
        }
        return cls(approximation.network, project, facts)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        points = student.embedding
        if self.project is not None:
            points = self.project(points)
        return F.mse_loss(self.describe(points), self.describe(teacher.embedding))

    def facts(self) -> dict[str, Any]:
        """Tells the parameters of V and, of a RipsNet, how well it stands for the exact one."""
        return self._facts


def learn(
    source: Source, size: int, form: Form, network: Name, training: Training
) -> Approximation:
    """Trains an approximator on clouds of a teacher's embeddings, or loads it where that is done.

    The embeddings of ``training.passes`` augmented passes are kept, 4 d bytes an image and pass;
    each epoch cuts them into new clouds. One image in ten is in no training cloud: the clouds of
    these judge the network.

    Args:
        source: The teacher's answers to the training images, and where to keep the result.
        size: Points in a cloud.
        form: What the network learns to guess.
        network: Which it is.
        training: How it is trained.
    """
    about = json.dumps([source.teacher_hash, size, form, asdict(training)])
    path = source.folder / f"{network}-{files.sha256(about.encode())[:8]}.safetensors"
    if path.exists():
        return Approximation.from_bytes(path.read_bytes())
    stream = _Clouds(source, size, training.passes)
    first, held_out = stream.training(0), stream.held_out()
    exact = Exact(FORMS[form].fit(rips(first)))
    saved = path.with_suffix(".state")
    state = torch.load(saved, weights_only=True) if saved.exists() else None
    title = {"ripsnet": "RipsNet", "distancenet": "DistanceNet"}[network]
    with source.progress.bar(title, training.length(network), "epochs") as advance:
        if state is not None:
            advance(state["epoch"], "")

        def after_epoch(epoch: int, error: float, state: dict[str, Any]) -> None:
            often = epoch % 10 == 0
            advance(1, f"epoch {epoch}, held-out error {error:.5f}" if often else "")
            if often:
                content = io.BytesIO()
                torch.save(state, content)
                files.write(saved, content.getvalue())

        trained = train(
            stream.training,
            held_out,
            exact,
            training,
            network=network,
            state=state,
            after_epoch=after_epoch,
        )
    judged = fidelity(trained, exact, first, held_out)
    source.progress.say(f"{title}: {judged}")
    if judged.r2 < WARN_BELOW:
        source.progress.say(
            f"warning: this {title} explains {max(judged.r2, 0):.0%} of what differs between "
            "clouds; `via: exact` explains all of it and is faster"
        )
    width = first.shape[-1]
    approximation = Approximation(trained, exact, size, width, source.teacher_hash, judged)
    files.write(path, approximation.to_bytes())
    saved.unlink(missing_ok=True)
    return approximation


class _Clouds:
    """Clouds of a teacher's embeddings, cut anew each epoch from some augmented passes."""

    def __init__(self, source: Source, size: int, passes: int) -> None:
        self.size = size
        self.passes = []
        with source.progress.bar("Clouds", passes * source.images, "images") as advance:
            for epoch in range(passes):
                answers = source.answers(epoch)
                index, embeddings = [], []
                for batch, features in answers:
                    index.append(batch.index)
                    embeddings.append(features.embedding)
                    advance(len(batch.index), "")
                self.passes.append((torch.cat(index), torch.cat(embeddings)))
        order = torch.randperm(source.images, generator=torch.Generator().manual_seed(0))
        self.kept_back = torch.zeros(source.images, dtype=torch.bool)
        self.kept_back[order[: max(source.images // 10, 2 * size)]] = True
        if source.images < 3 * size:
            raise ValueError(
                f"{source.images} training images are too few for an approximator: it needs "
                f"clouds of {size} to learn from and two more to be judged by; use `via: exact`"
            )

    def training(self, epoch: int) -> Tensor:
        """Clouds without the images that are kept back, (clouds, n, d)."""
        return torch.cat(
            [
                cut_clouds(
                    embeddings[~self.kept_back[index]],
                    self.size,
                    torch.Generator().manual_seed(epoch * len(self.passes) + number),
                )
                for number, (index, embeddings) in enumerate(self.passes)
            ]
        )

    def held_out(self) -> Tensor:
        """Clouds of the images that are kept back, at least 256, (clouds, n, d)."""
        generator = torch.Generator().manual_seed(0)
        clouds: list[Tensor] = []
        while sum(map(len, clouds)) < HELD_OUT:
            index, embeddings = self.passes[len(clouds) % len(self.passes)]
            clouds.append(cut_clouds(embeddings[self.kept_back[index]], self.size, generator))
        return torch.cat(clouds)


def _check_fit(approximation: Approximation, file: str, teacher: str, size: int) -> None:
    if approximation.teacher != teacher:
        raise ValueError(
            f"{file} was made for another teacher: it learnt {approximation.teacher[:8]}, "
            f"this one is {teacher[:8]}"
        )
    if approximation.cloud_size != size:
        raise ValueError(
            f"{file} was made for clouds of {approximation.cloud_size} points, "
            f"the batches here have {size}"
        )
