"""Losses on the shape of a batch of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd._io import files
from topkd._runtime import processes
from topkd.features import Batch, Features
from topkd.losses.approximators import check_fit, fit, learn, scale_of
from topkd.losses.base import Source
from topkd.losses.controls import (
    CLOUDS,
    Edges,
    LabelFree,
    Target,
    batch_tree,
    check_tree,
    tree_diagram,
)
from topkd.topology import rips
from topkd.topology.approximation import Approximation, Exact, Training
from topkd.topology.scaling import Unit
from topkd.topology.serialization import Form, to_json

Via = Literal["exact", "ripsnet", "distancenet"]


class TopKD(LabelFree):
    r"""Compares the global shape of a batch: the persistence of both clouds of embeddings.

    .. math:: \frac{1}{m} \lVert V(f^t) - V(f^s) \rVert^2

    where V describes the cloud that the n embeddings of the batch form by m numbers. It does not
    see which point is which image: the other terms have to say so.

    Args:
        describe: V, from a cloud (n, d) to (m,); from a cloud and the edges (n - 1, 2) of a tree
            where edges are random.
        project: Takes the student's embedding to the width that ``describe`` needs.
        facts: What readers of the results should know of V.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``other`` for the teacher's answers to other images, ``mean`` for the mean of V over
            clouds of the teacher, see there.

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
        describe: Callable[..., Tensor],
        project: nn.Module | None = None,
        facts: dict[str, Any] | None = None,
        *,
        edges: Edges = "persistent",
        target: Target = "own",
    ) -> None:
        super().__init__(edges, target)
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
        dimension: Literal[0, 1] = 0,
        scale: Unit | None = None,
        edges: Edges = "persistent",
        target: Target = "own",
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
                paper's 400 pixels; of dimension 1, integrals over cells, weighted by persistence).
                RipsNet guesses the image if not told, all else the vector.
            dimension: 0 for clusters, 1 for loops.
            scale: What the lengths of each cloud are divided by: "none", or the "mean", "median" or
                "max" of the lengths of its spanning tree. The mean for vectors if not told, and
                none for images, as in the paper.
            edges: Which edges count.
            target: Whose answers the student's are compared with.
            training: How the approximator is trained, if there is one.
            file: An approximator that was trained before, to be used instead of training one.

        Raises:
            ValueError: If the approximator in the file was made for another teacher, other clouds,
                or another dimension or scale; if the control is none of this loss.
        """
        cls.check(edges, target)  # before anything is learnt
        check_tree(edges, dimension)
        if via != "exact" and edges == "random":
            raise ValueError(f"edges: random cannot be told to what {via} learnt; use via: exact")
        form = form or ("image" if via == "ripsnet" else "vector")
        describe: Callable[..., Tensor]
        project, facts = None, dict[str, Any](via=via, dimension=dimension)
        if via == "exact":
            describe, exact = _exactly(source, form, dimension, scale, edges)
        else:
            (size, width), own_width = teacher.embedding.shape, student.embedding.shape[1]
            with torch.random.fork_rng(devices=[]):  # the projection is the same, trained or loaded
                if file is None:
                    approximation = processes.by_first(
                        lambda: learn(source, size, form, via, training, dimension, scale)
                    )
                else:
                    content = processes.by_first(lambda: files.read_checked(Path(file)))
                    approximation = Approximation.from_bytes(content)
                    check_fit(approximation, file, source.teacher_hash, size, dimension, scale)
            describe, exact = approximation.network, approximation.exact
            facts["fidelity"] = asdict(approximation.fidelity)
            if own_width != width and approximation.network.width is not None:
                project = nn.Linear(own_width, width)
        facts |= {"scale": scale_of(exact), "vectorisation": to_json(exact.vectorisation)}
        loss = cls(describe, project, facts, edges=edges, target=target)
        loss.hold(teacher, source)
        return loss

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        if self.project is not None:
            student = replace(student, embedding=self.project(student.embedding))
        return super().forward(student, teacher, batch)

    def described(self, points: Tensor, tree: Tensor | None) -> Tensor:
        return self.describe(points) if tree is None else self.describe(points, tree)

    def compared(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher)

    def facts(self) -> dict[str, Any]:
        """Tells the parameters of V and, of a RipsNet, how well it stands for the exact one."""
        return self._facts


def _exactly(
    source: Source, form: Form, dimension: int, scale: Unit | None, edges: Edges
) -> tuple[Callable[..., Tensor], Exact]:
    """What describes clouds, by a tree where edges are random, and how it was fitted."""
    seen = list(islice(source.answers(0), CLOUDS))
    clouds = torch.stack([made.embedding for _, made in seen])
    if edges == "persistent":
        exact = fit(rips(clouds, max_dim=dimension), form, dimension, scale)
        return exact, exact
    trees = torch.stack([batch_tree(shown, 0) for shown, _ in seen])
    exact = fit(tree_diagram(clouds, trees), form, dimension, scale)

    def by_tree(points: Tensor, tree: Tensor) -> Tensor:
        return exact.vectorisation(tree_diagram(points, tree))

    return by_tree, exact
