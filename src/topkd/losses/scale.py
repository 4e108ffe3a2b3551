"""A control for topological losses: compares the size of the clouds and ignores their shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import EMBEDDINGS, check_shapes
from topkd.losses.base import Loss, LossInfo


def cloud_scale(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the mean pairwise distances of two batches of embeddings.

    .. math:: \Big(\frac{\bar d^s}{\bar d^t} - 1\Big)^2, \qquad
        \bar d = \frac{2}{n (n - 1)} \sum_{i < j} \lVert f_i - f_j \rVert

    Args:
        student: Embeddings, (n, d).
        teacher: Embeddings, (n, d'); the width may differ.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batches differ in size.

    Examples:
        >>> corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(cloud_scale(3 * corners.flip(0), corners).item(), 4)  # three times as large
        4.0
    """
    check_shapes("embeddings", student, teacher, 1, form=EMBEDDINGS)
    half = (torch.float16, torch.bfloat16)  # in which there is no pdist
    ours, theirs = (
        F.pdist(each.float() if each.dtype in half else each).mean() for each in (student, teacher)
    )
    return (ours / theirs.where(theirs > 0, 1) - 1).square().to(student.dtype)


class CloudScale(Loss):
    """:func:`cloud_scale` of the embeddings.

    It is a control: if a topological loss helps no more than this one, the size of the embedding
    explains the gain, not its shape.

    References:
        Defined here as a control for
        Do Topological Characteristics Help in Knowledge Distillation? (Kim et al., ICML 2024)
        https://proceedings.mlr.press/v235/kim24aj.html
    """

    info = LossInfo(
        name="scale",
        group="topology",
        compares="size of the cloud of embeddings, a control",
        paper="defined here",
        url="https://proceedings.mlr.press/v235/kim24aj.html",
        cost="n² d",
    )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return cloud_scale(student.embedding, teacher.embedding)
