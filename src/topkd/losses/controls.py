"""Ablation controls for topological losses.

================  ==================================================================================
option            effect
================  ==================================================================================
``edges``         ``random``: a uniformly random spanning tree, drawn for each batch, replaces all
                  minimum spanning trees. Tests whether the critical edges matter
``target``        whether the correspondence to the teacher's images matters:
..                ``permuted``: each image is compared with another image of its batch
..                ``other``: the batch is compared with the teacher's previous batch
..                ``mean``: each batch is compared with the mean vectorization of teacher clouds
================  ==================================================================================

With a random tree, every loss depends on the correspondence of images, as both clouds share the
tree.

Random draws are functions of the epoch and of the set of images in the batch. They are the same
when a run is repeated or resumed, and do not use the global random number generator.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import one_of
from topkd.losses.base import Loss, LossContext
from topkd.topology import Diagrams, edge_lengths

Edges = Literal["persistent", "random"]
Target = Literal["own", "permuted", "other", "mean"]

CLOUDS = 64  # teacher clouds from which means, ranges and scales are computed


def random_tree(points: int, generator: torch.Generator) -> Tensor:
    r"""Draws one of the :math:`n^{n-2}` spanning trees of n points uniformly.

    Vertex i, from 1 on, is joined to vertex :math:`\min(u_i, i - 1)` with :math:`u_i` uniform on
    0 to n - 1; then the vertices are relabeled by a random permutation.

    Args:
        points: Number of points n.
        generator: Random number generator.

    Returns:
        Edges, (n - 1, 2).

    References:
        The Random Walk Construction of Uniform Spanning Trees and Uniform Labeled Trees
        (Aldous, SIAM J. Discrete Mathematics 1990), algorithm 2
        https://doi.org/10.1137/0403039

    Examples:
        >>> random_tree(64, torch.Generator().manual_seed(0)).shape
        torch.Size([63, 2])
    """
    drawn = torch.randint(points, (points - 1,), generator=generator)
    names = torch.randperm(points, generator=generator)
    return torch.stack([names[1:], names[drawn.minimum(torch.arange(points - 1))]], dim=1)


def tree_diagram(points: Tensor, edges: Tensor) -> Diagrams:
    """Computes the H0 diagram of points, with the given edges in place of their spanning tree.

    Args:
        points: (n, d) or (clouds, n, d).
        edges: (n - 1, 2) or (clouds, n - 1, 2).
    """
    clouds = points[None] if points.ndim == 2 else points
    deaths = edge_lengths(clouds, edges.expand(len(clouds), -1, -1)).sort(-1).values
    bars = torch.stack([torch.zeros_like(deaths), deaths], dim=-1)
    return Diagrams._of_bars(bars[0] if points.ndim == 2 else bars, 0)


def batch_tree(batch: Batch, epoch: int) -> Tensor:
    """Draws the edges (n - 1, 2) that replace the spanning tree of a batch in an epoch."""
    drawn = random_tree(len(batch.index), _generator("tree", batch, epoch))
    return _places(batch)[drawn.to(batch.index.device)]


def _places(batch: Batch) -> Tensor:
    """Returns the positions of the images, sorted by their index."""
    return batch.index.argsort(stable=True)


def _generator(purpose: str, batch: Batch, epoch: int) -> torch.Generator:
    index = batch.index.sort().values.tolist()
    digest = hashlib.sha256(f"{purpose} {epoch} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def check_tree(edges: Edges, dimension: int) -> None:
    """Rejects a random tree for losses that do not use one.

    Raises:
        ValueError: If ``edges`` is "random" in dimension 1.
    """
    if edges == "random" and dimension > 0:
        raise ValueError(
            "edges: random replaces the spanning tree, which determines dimension 0 only; "
            "use dimension: 0"
        )


class Topological(Loss):
    """Base class of topological losses with ablation controls.

    Args:
        edges: "persistent" for critical edges, "random" for a random tree.
        target: Teacher features that the student is compared with.

    Raises:
        ValueError: If an option is unknown, or the target is not a control of this loss.
    """

    no_control: ClassVar[Mapping[Target, str]]
    """Targets that are not a control of this loss -> reason and alternative."""

    def __init__(self, edges: Edges, target: Target) -> None:
        super().__init__()
        one_of("edges", edges, Edges)
        one_of("target", target, Target)
        if target in self.no_control:
            raise ValueError(f"target: {target} {self.no_control[target]}")
        self.edges, self.target, self.epoch = edges, target, 0

    def on_epoch_start(self, epoch: int) -> None:
        self.epoch = epoch

    def tree(self, batch: Batch) -> Tensor | None:
        """Draws the edges that replace a batch's spanning tree; None for critical edges."""
        return None if self.edges == "persistent" else batch_tree(batch, self.epoch)


class PermutationInvariant(Topological):
    """Base class of losses between vectorizations or diagrams, invariant to the order of images."""

    no_control: ClassVar[Mapping[Target, str]] = {
        "permuted": "changes nothing for a loss that is invariant to permutations; use other",
    }
    held: Tensor | None  # teacher embeddings of the previous batch, or the mean vectorization

    def __init__(self, edges: Edges, target: Target) -> None:
        super().__init__(edges, target)
        self.register_buffer("held", None)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Computes the features that the target needs before the first batch.

        For ``other`` these are teacher embeddings of the sample batch; for ``mean``, the mean
        vectorization of 64 batches.
        """
        if self.target == "other":
            self.held = teacher.embedding.detach().clone()
        if self.target == "mean":
            vectors = [
                self.described(features.embedding, self.tree(batch))
                for batch, features in islice(context.teacher_batches(0), CLOUDS)
            ]
            self.held = torch.stack(vectors).mean(0)

    @abstractmethod
    def described(self, points: Tensor, tree: Tensor | None) -> Tensor:
        """Vectorizes a cloud (n, d), by the edges of a tree if one is given."""

    @abstractmethod
    def compared(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compares the vectorizations of two clouds."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        tree = self.tree(batch)
        return self.compared(
            self.described(student.embedding, tree),
            self._reference(teacher.embedding, batch, tree),
        )

    def _reference(self, teacher: Tensor, batch: Batch, tree: Tensor | None) -> Tensor:
        """Returns the vectorization that the student's is compared with."""
        if self.target == "own":
            return self.described(teacher, tree)
        if self.held is None:
            raise ValueError(f"target: {self.target} needs setup() before the first batch")
        if self.target == "mean":
            return self.held
        previous, places = self.held, _places(batch)
        if self.training:
            self.held = teacher.detach()[places]
        # The features from setup are of one process; gathered clouds are larger.
        points = previous[places.argsort()] if len(previous) == len(teacher) else teacher
        return self.described(points, tree)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "held")
        if saved is not None and self.held is not None:  # gathered clouds are larger, as above
            self.held = self.held.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Matched(Topological):
    """Base class of losses that depend on the correspondence of images between both clouds."""

    no_control: ClassVar[Mapping[Target, str]] = {
        "other": "is for permutation-invariant losses, which this one is not; use permuted",
        "mean": "needs a vectorization of the cloud, which this loss does not have; use permuted",
    }

    @abstractmethod
    def compared(self, student: Tensor, teacher: Tensor, tree: Tensor | None) -> Tensor:
        """Compares two clouds (n, d) of the same images, by the edges of a tree if one is given."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        reference = teacher.embedding
        if self.target == "permuted":
            cycle = self._cycle(batch)
            reference = torch.empty_like(reference).index_copy(0, cycle, reference[cycle.roll(1)])
        return self.compared(student.embedding, reference, self.tree(batch))

    def _cycle(self, batch: Batch) -> Tensor:
        """Returns a random cyclic order of the batch; a shift along it moves every image."""
        generator = _generator("permuted", batch, self.epoch)
        order = torch.randperm(len(batch.index), generator=generator)
        return _places(batch)[order.to(batch.index.device)]
