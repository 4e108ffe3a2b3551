"""TopKD: a loss on the persistence of a batch of embeddings."""

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
from topkd.losses._validation import one_of, refuse_unused
from topkd.losses.approximators import check_fit, check_kind, fit, learn, scale_of
from topkd.losses.base import LossContext, LossInfo
from topkd.losses.controls import (
    CLOUDS,
    Edges,
    PermutationInvariant,
    Target,
    batch_tree,
    check_tree,
    tree_diagram,
)
from topkd.topology import rips
from topkd.topology.approximation import Approximation, Exact, Training
from topkd.topology.scaling import TreeScale
from topkd.topology.serialization import to_json
from topkd.topology.vectorization import vectorization_type

Via = Literal["exact", "ripsnet", "distancenet"]


def topological_distillation(
    student: Tensor, teacher: Tensor, describe: Callable[[Tensor], Tensor]
) -> Tensor:
    r"""Compares the vectorized persistence of two batches of embeddings.

    .. math:: \frac{1}{m} \lVert V(f^t) - V(f^s) \rVert^2

    Args:
        student: Embeddings :math:`f^s`, (n, d).
        teacher: Embeddings :math:`f^t`, (n, d'); the width may differ.
        describe: Vectorization V, which maps a cloud of n points to m numbers.

    Returns:
        The loss, a scalar.

    References:
        Do Topological Characteristics Help in Knowledge Distillation? (Kim et al., ICML 2024)
        https://proceedings.mlr.press/v235/kim24aj.html

    Examples:
        >>> from topkd.topology import PersistenceVector
        >>> teacher = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> vector = PersistenceVector.fit(rips(teacher[None]))
        >>> student = teacher.flip(0)  # the same shape, permuted
        >>> loss = topological_distillation(student, teacher, lambda points: vector(rips(points)))
        >>> loss.item() < 1e-9
        True
    """
    return F.mse_loss(describe(student), describe(teacher))


class TopKD(PermutationInvariant):
    r"""Compares the global topology of a batch: the persistence of both clouds of embeddings.

    .. math:: \frac{1}{m} \lVert V(f^t) - V(f^s) \rVert^2

    where V maps the cloud of the n embeddings of the batch to m numbers: a vectorization of its
    persistence diagram, exact or approximated by a network. The loss is invariant to permutations
    of the points, so it needs other terms that match individual images.

    Args:
        via: Whether persistence is computed exactly, approximated by a RipsNet, as in the paper, or
            approximated from distances by a DistanceNet, which is more accurate.
        form: Name of a vectorization: "vector" (20 numbers), "image" (the paper's 400 pixels; in
            dimension 1, integrals over cells weighted by persistence), "betti", "landscape",
            "silhouette" or "entropy". Defaults to the image for RipsNet and to the vector
            otherwise.
        dimension: 0 for clusters, 1 for loops.
        scale: Scale of lengths: a statistic of the edges of the minimum spanning tree, see
            :mod:`topkd.topology.scaling`. Defaults to "none" for images, as in the paper, and to
            "tree_mean" for all other vectorizations.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``other`` for the teacher's features of other images, ``mean`` for the mean of V
            over clouds of the teacher, see there.
        training: Training settings of the approximator.
        file: File of a trained approximator, used instead of training one.

    Raises:
        ValueError: If an option is unknown or has no effect with the others, or the control does
            not apply to this loss.

    References:
        Do Topological Characteristics Help in Knowledge Distillation? (Kim et al., ICML 2024)
        https://proceedings.mlr.press/v235/kim24aj.html

    Examples:
        >>> TopKD(via="ripsnet").form, TopKD(dimension=1).form
        ('image', 'vector')
    """

    info = LossInfo(
        name="topkd",
        group="topology",
        compares="persistence of the embeddings",
        paper="Kim et al., ICML 2024",
        url="https://proceedings.mlr.press/v235/kim24aj.html",
        cost="n² d",
    )

    def __init__(
        self,
        *,
        via: Via = "exact",
        form: str | None = None,
        dimension: Literal[0, 1] = 0,
        scale: TreeScale | None = None,
        edges: Edges = "persistent",
        target: Target = "own",
        training: Training = Training(),  # noqa: B008  (it is frozen)
        file: str | None = None,
    ) -> None:
        super().__init__(edges, target)
        check_tree(edges, dimension)
        self.via: Via = one_of("via", via, Via)
        if via != "exact" and edges == "random":
            raise ValueError(f"edges: random has no meaning for {via}; use via: exact")
        if via == "exact":
            refuse_unused(self.options, ("training", "file"), "via: exact")
        if file is not None:
            refuse_unused(self.options, ("training",), "file")
        self.form = form or ("image" if via == "ripsnet" else "vector")
        vectorization_type(self.form)
        if scale is not None:
            one_of("scale", scale, TreeScale)
        self.dimension, self.scale = one_of("dimension", dimension, Literal[0, 1]), scale
        self.training_of_approximator, self.file = training, file
        self.describe: Callable[..., Tensor] | None = None
        self.project: nn.Module | None = None
        self._metadata: dict[str, Any] = {"via": via, "dimension": dimension}

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Fits the vectorization, and trains or loads the approximator, if there is one.

        Raises:
            ValueError: If the file was made for another teacher, cloud size, dimension or scale, or
                holds another network or vectorization than ``via`` and ``form``.
        """
        if self.via == "exact":
            self.describe, exact = self._exactly(context)
        else:
            (size, width), own_width = teacher.embedding.shape, student.embedding.shape[1]
            approximation = self._approximation(context, size)
            self.describe, exact = approximation.network, approximation.exact
            self._metadata["fidelity"] = asdict(approximation.fidelity)
            if own_width != width and approximation.network.width is not None:
                self.project = nn.Linear(own_width, width)
        self._metadata |= {
            "scale": scale_of(exact),
            "vectorization": to_json(exact.vectorization),
        }
        super().setup(student, teacher, context)

    def _exactly(self, context: LossContext) -> tuple[Callable[..., Tensor], Exact]:
        """Fits an exact vectorization, which uses a random tree if ``edges`` is "random"."""
        kept = list(islice(context.teacher_batches(0), CLOUDS))
        clouds = torch.stack([made.embedding for _, made in kept])
        if self.edges == "persistent":
            diagrams = rips(clouds, max_dim=self.dimension)
            exact = fit(diagrams, self.form, self.dimension, self.scale)
            return exact, exact
        trees = torch.stack([batch_tree(shown, 0) for shown, _ in kept])
        exact = fit(tree_diagram(clouds, trees), self.form, self.dimension, self.scale)

        def by_tree(points: Tensor, tree: Tensor) -> Tensor:
            return exact.vectorization(tree_diagram(points, tree))

        return by_tree, exact

    def _approximation(self, context: LossContext, size: int) -> Approximation:
        """Trains or loads the approximator for clouds of so many points."""
        assert self.via != "exact"
        with torch.random.fork_rng(devices=[]):  # the projection is the same, trained or loaded
            if self.file is None:
                options = self.form, self.via, self.training_of_approximator
                return processes.by_first(
                    lambda: learn(context, size, *options, self.dimension, self.scale)
                )
            content = processes.by_first(lambda: files.read_checked(Path(str(self.file))))
            approximation = Approximation.from_bytes(content)
            check_fit(
                approximation, self.file, context.teacher_hash, size, self.dimension, self.scale
            )
            check_kind(approximation, self.file, self.via, self.options.get("form"))
            return approximation

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        if self.project is not None:
            student = replace(student, embedding=self.project(student.embedding))
        return super().forward(student, teacher, batch)

    def described(self, points: Tensor, tree: Tensor | None) -> Tensor:
        if self.describe is None:
            raise ValueError("setup() has to fit the vectorization before the first batch")
        return self.describe(points) if tree is None else self.describe(points, tree)

    def compared(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher)

    def metadata(self) -> dict[str, Any]:
        """Returns the parameters of V and, for an approximator, its fidelity."""
        return self._metadata
