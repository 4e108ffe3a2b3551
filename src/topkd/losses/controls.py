"""Controls of losses on shape, which tell what of them matters: the edges, or whose they are.

================  ==================================================================================
option            asks
================  ==================================================================================
``edges``         ``random``: is it the critical edges, or would any n - 1 edges do? One tree, drawn
                  uniformly for every batch, stands in for all minimum spanning trees
``target``        whether it matters which images the teacher answered to:
..                ``permuted``: each image gets the teacher's answer to another of its batch
..                ``other``: the batch gets the teacher's answers to the batch before it
..                ``mean``: every batch gets the mean of what describes the teacher's clouds
================  ==================================================================================

By a random tree every loss sees which image is which, as the tree is the same for both clouds.

What is drawn is a function of the epoch and of which images form the batch, so that it is the same
when a run is repeated or goes on after a stop, and draws nothing from the networks' random numbers.
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

CLOUDS = 64  # of the teacher, from which means, ranges and scales are read off


def random_tree(points: int, generator: torch.Generator) -> Tensor:
    r"""Draws one of the :math:`n^{n-2}` spanning trees of n points, all equally likely.

    Vertex i, from 1 on, is joined to vertex :math:`\min(u_i, i - 1)` with :math:`u_i` uniform on
    0 to n - 1; then the vertices are named in random order.

    Args:
        points: How many, n.
        generator: What draws.

    Returns:
        Its edges, (n - 1, 2).

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
    """Makes the diagram of H0 that points would have, were these edges their spanning tree.

    Args:
        points: (n, d) or (clouds, n, d).
        edges: (n - 1, 2) or (clouds, n - 1, 2).
    """
    clouds = points[None] if points.ndim == 2 else points
    deaths = edge_lengths(clouds, edges.expand(len(clouds), -1, -1)).sort(-1).values
    bars = torch.stack([torch.zeros_like(deaths), deaths], dim=-1)
    return Diagrams._of_bars(bars[0] if points.ndim == 2 else bars, 0)


def batch_tree(batch: Batch, epoch: int) -> Tensor:
    """Draws the edges (n - 1, 2) that stand in for the spanning tree of a batch in an epoch."""
    drawn = random_tree(len(batch.index), _generator("tree", batch, epoch))
    return _places(batch)[drawn.to(batch.index.device)]


def _places(batch: Batch) -> Tensor:
    """The images in an order that is the same in whatever order they come."""
    return batch.index.argsort(stable=True)


def _generator(purpose: str, batch: Batch, epoch: int) -> torch.Generator:
    index = batch.index.sort().values.tolist()
    digest = hashlib.sha256(f"{purpose} {epoch} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def check_tree(edges: Edges, dimension: int) -> None:
    """Refuses a random tree where no tree is looked at.

    Raises:
        ValueError: If it is asked for in dimension 1.
    """
    if edges == "random" and dimension > 0:
        raise ValueError(
            "edges: random stands in for the spanning tree, from which only dimension 0 is read; "
            "use dimension: 0"
        )


class Topological(Loss):
    """A loss on the shape of a batch, which can be its own control.

    Args:
        edges: Which edges count.
        target: Whose answers the student's are compared with.

    Raises:
        ValueError: If there are no such edges, or the target makes no control of this loss.
    """

    no_control: ClassVar[Mapping[Target, str]]
    """Targets that would not be a control, why not, and which is."""

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
        """Draws the edges that stand in for a batch's spanning tree; None if none do."""
        return None if self.edges == "persistent" else batch_tree(batch, self.epoch)


class PermutationInvariant(Topological):
    """A loss on what describes each cloud as a whole: it does not see which image is which."""

    no_control: ClassVar[Mapping[Target, str]] = {
        "permuted": "changes nothing for a loss that does not see which image is which; use other",
    }
    held: Tensor | None  # the teacher's answers to the batch before, or the mean description

    def __init__(self, edges: Edges, target: Target) -> None:
        super().__init__(edges, target)
        self.register_buffer("held", None)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Finds the features that the target needs before the first batch.

        For ``other`` these are of a batch before the first; for ``mean``, the mean description of
        64 batches.
        """
        if self.target == "other":
            self.held = teacher.embedding.detach().clone()
        if self.target == "mean":
            seen = islice(context.teacher_batches(0), CLOUDS)
            described = [self.described(made.embedding, self.tree(shown)) for shown, made in seen]
            self.held = torch.stack(described).mean(0)

    @abstractmethod
    def described(self, points: Tensor, tree: Tensor | None) -> Tensor:
        """Describes a cloud (n, d), by the edges of a tree if one is given."""

    @abstractmethod
    def compared(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compares what describes two clouds."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        tree = self.tree(batch)
        return self.compared(
            self.described(student.embedding, tree), self._aim(teacher.embedding, batch, tree)
        )

    def _aim(self, own: Tensor, batch: Batch, tree: Tensor | None) -> Tensor:
        """What the student's description is compared with."""
        if self.target == "own":
            return self.described(own, tree)
        if self.held is None:
            raise ValueError(f"target: {self.target} needs setup() before the first batch")
        if self.target == "mean":
            return self.held
        before, places = self.held, _places(batch)
        if self.training:
            self.held = own.detach()[places]
        # What came before the first batch is of one process, where clouds may be of several.
        points = before[places.argsort()] if len(before) == len(own) else own
        return self.described(points, tree)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "held")
        if saved is not None and self.held is not None:  # the same clouds may be larger, as above
            self.held = self.held.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Matched(Topological):
    """A loss on which images are close to which: both clouds are the same images."""

    no_control: ClassVar[Mapping[Target, str]] = {
        "other": "is for losses that do not see which image is which, this one does; use permuted",
        "mean": "needs numbers that describe a cloud as a whole, here are none; use permuted",
    }

    @abstractmethod
    def compared(self, student: Tensor, teacher: Tensor, tree: Tensor | None) -> Tensor:
        """Compares two clouds (n, d) of the same images, by the edges of a tree if one is given."""

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        answers = teacher.embedding
        if self.target == "permuted":
            ring = self._ring(batch)
            answers = torch.empty_like(answers).index_copy(0, ring, answers[ring.roll(1)])
        return self.compared(student.embedding, answers, self.tree(batch))

    def _ring(self, batch: Batch) -> Tensor:
        """The batch in random order, so that with the next in it no image keeps its place."""
        generator = _generator("permuted", batch, self.epoch)
        order = torch.randperm(len(batch.index), generator=generator)
        return _places(batch)[order.to(batch.index.device)]
