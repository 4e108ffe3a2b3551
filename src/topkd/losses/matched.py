"""Topological losses between clouds of the same images, with known correspondence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from topkd.losses._validation import at_least_one, one_of, refuse_unused
from topkd.losses.base import LossInfo
from topkd.losses.controls import Edges, Matched, Target
from topkd.topology import edge_matching, rtd_lite, ultrametric
from topkd.topology.scaling import DistanceScale


class EdgeMatching(Matched):
    """:func:`~topkd.topology.edge_matching` of the embeddings, along both spanning trees.

    The paper does not normalize lengths. Its released code divides the teacher's lengths by their
    maximum and the student's by a learned scale, and omits the factor ½: use ``scale: learned``
    with twice the weight. Here the learned scale is the exponential of a weight, so it stays
    positive.

    Args:
        scale: Scale of lengths, see :mod:`topkd.topology.scaling`, or "learned". Defaults to the
            mean of all pairwise distances.
        detach_scale: Whether the scale is a constant for the gradient.
        symmetric: Whether to include the edges of the student's tree as well as the teacher's.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``permuted`` for the teacher's features of other images, see there.

    Raises:
        ValueError: If an option is unknown, or the target is not a control of this loss.

    References:
        Topological Autoencoders (Moor et al., ICML 2020)
        https://arxiv.org/abs/1906.00722

    Examples:
        >>> import torch
        >>> from topkd.features import Batch, Features
        >>> cloud = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        >>> teacher, student = Features(cloud, cloud), Features(cloud, 3 * cloud)
        >>> batch = Batch(torch.zeros(8, 3, 8, 8), torch.zeros(8).long(), torch.arange(8))
        >>> EdgeMatching()(student, teacher, batch).item() < 1e-6  # invariant to scale
        True
    """

    info = LossInfo(
        name="edge_matching",
        group="topology",
        compares="lengths of the edges of both spanning trees",
        paper="Moor et al., ICML 2020",
        url="https://arxiv.org/abs/1906.00722",
        cost="n² d",
    )

    def __init__(
        self,
        *,
        scale: DistanceScale | Literal["learned"] = "mean",
        detach_scale: bool = False,
        symmetric: bool = True,
        edges: Edges = "persistent",
        target: Target = "own",
    ) -> None:
        super().__init__(edges, target)
        if scale != "learned":
            one_of("scale", scale, DistanceScale)
        if scale in ("none", "learned"):
            refuse_unused(self.options, ("detach_scale",), f"scale: {scale}")
        self.scale, self.detach_scale, self.symmetric = scale, detach_scale, symmetric
        self.log_scale = nn.Parameter(torch.zeros(())) if scale == "learned" else None

    def compared(self, student: Tensor, teacher: Tensor, tree: Tensor | None) -> Tensor:
        if self.log_scale is not None:
            student = student / self.log_scale.exp()
        return edge_matching(
            student,
            teacher,
            scale="none" if self.scale == "learned" else self.scale,
            teacher_scale="max" if self.scale == "learned" else self.scale,
            detach_scale=self.detach_scale,
            symmetric=self.symmetric,
            edges="tree" if tree is None else tree,
        )


class RTDLite(Matched):
    """:func:`~topkd.topology.rtd_lite` of the embeddings: the lengths at which clusters merge.

    Args:
        scale: Scale of lengths, see :mod:`topkd.topology.scaling`. Defaults to the 0.9-quantile of
            all pairwise distances, as in the paper; ``matrix_quantile`` is that of its code.
        detach_scale: Whether the scale is a constant for the gradient.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``permuted`` for the teacher's features of other images, see there.

    Raises:
        ValueError: If an option is unknown, or the target is not a control of this loss.

    References:
        RTD-Lite: Scalable Topological Analysis for Comparing Weighted Graphs in Learning Tasks
        (Tulchinskii et al., AISTATS 2025)
        https://arxiv.org/abs/2503.11910

    Examples:
        >>> RTDLite(scale="matrix_quantile").scale
        'matrix_quantile'
    """

    info = LossInfo(
        name="rtd_lite",
        group="topology",
        compares="lengths at which the same clusters form",
        paper="Tulchinskii et al., AISTATS 2025",
        url="https://arxiv.org/abs/2503.11910",
        cost="n² d",
    )

    def __init__(
        self,
        *,
        scale: DistanceScale = "quantile",
        detach_scale: bool = False,
        edges: Edges = "persistent",
        target: Target = "own",
    ) -> None:
        super().__init__(edges, target)
        if scale == "none":
            refuse_unused(self.options, ("detach_scale",), "scale: none")
        self.scale, self.detach_scale = one_of("scale", scale, DistanceScale), detach_scale

    def compared(self, student: Tensor, teacher: Tensor, tree: Tensor | None) -> Tensor:
        return rtd_lite(
            student, teacher, scale=self.scale, detach_scale=self.detach_scale, edges=tree
        )


class Ultrametric(Matched):
    """:func:`~topkd.topology.ultrametric` of the embeddings: merge lengths of all pairs of images.

    Args:
        order: The exponent of a difference, at least 1.
        scale: Scale of lengths, see :mod:`topkd.topology.scaling`. Defaults to the mean of all
            pairwise distances.
        detach_scale: Whether the scale is a constant for the gradient.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``permuted`` for the teacher's features of other images, see there.

    Raises:
        ValueError: If the order is below 1, or the target is not a control of this loss.

    References:
        Characterization, Stability and Convergence of Hierarchical Clustering Methods
        (Carlsson & Mémoli, JMLR 2010), for the ultrametric; as a loss it is defined here
        https://jmlr.org/papers/v11/carlsson10a.html

    Examples:
        >>> Ultrametric(order=2.0, target="permuted").order
        2.0
    """

    info = LossInfo(
        name="ultrametric",
        group="topology",
        compares="lengths at which two images merge into one cluster",
        paper="Carlsson & Mémoli, JMLR 2010",
        url="https://jmlr.org/papers/v11/carlsson10a.html",
        cost="n² d",
    )

    def __init__(
        self,
        *,
        order: float = 1.0,
        scale: DistanceScale = "mean",
        detach_scale: bool = False,
        edges: Edges = "persistent",
        target: Target = "own",
    ) -> None:
        super().__init__(edges, target)
        one_of("scale", scale, DistanceScale)
        at_least_one("order", order)
        if scale == "none":
            refuse_unused(self.options, ("detach_scale",), "scale: none")
        self.order, self.scale, self.detach_scale = order, scale, detach_scale

    def compared(self, student: Tensor, teacher: Tensor, tree: Tensor | None) -> Tensor:
        return ultrametric(
            student,
            teacher,
            order=self.order,
            scale=self.scale,
            detach_scale=self.detach_scale,
            edges=tree,
        )
