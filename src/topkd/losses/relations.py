"""Losses on relations between the samples of a batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import (
    EMBEDDINGS,
    check_shapes,
    not_negative,
    positive,
)
from topkd.losses.base import Loss, LossInfo
from topkd.losses.maps import deepest
from topkd.topology.gradient import SMALL, bounded_divide


def directions(vectors: Tensor, small: float = SMALL) -> Tensor:
    """Normalizes vectors to unit length, with a bounded gradient near zero.

    Zero vectors stay zero.

    Args:
        vectors: (..., d).
        small: Norm below which the gradient is bounded.

    Returns:
        Unit vectors, (..., d).

    Examples:
        >>> import torch
        >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return bounded_divide(vectors, vectors.norm(dim=-1, keepdim=True), small)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the pairwise similarities of the samples of a batch.

    .. math:: \frac{1}{n^2} \lVert G^s - G^t \rVert^2, \qquad
        G_{i} = (F F^\top)_{i} \,/\, \lVert (F F^\top)_{i} \rVert

    where the row :math:`F_i` is the flattened feature of sample i. The loss is invariant to the
    scale of F.

    Args:
        student: :math:`F^s`, (n, ...); further dimensions are flattened.
        teacher: :math:`F^t`, (n, ...); the size may differ.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batch sizes differ, or a tensor is not floating-point.

    References:
        Similarity-Preserving Knowledge Distillation (Tung & Mori, ICCV 2019)
        https://arxiv.org/abs/1907.09682

    Examples:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> similarity_preserving(3 * rows, rows)
        tensor(0.)
        >>> similarity_preserving(torch.ones(2, 1), rows)  # two identical samples
        tensor(0.2929)
    """
    check_shapes("batches", student, teacher, 1)
    s, t = student.flatten(1), teacher.flatten(1)
    g_s, g_t = (directions(m @ m.T, SMALL**2) for m in (s, t))
    return F.mse_loss(g_s, g_t)


class SP(Loss):
    """:func:`similarity_preserving` of the last maps, SP.

    References:
        Similarity-Preserving Knowledge Distillation (Tung & Mori, ICCV 2019)
        https://arxiv.org/abs/1907.09682

    Examples:
        >>> import torch
        >>> maps = [torch.rand(4, 8, 2, 2, generator=torch.Generator().manual_seed(0))]
        >>> student = Features(torch.zeros(4, 10), torch.zeros(4, 8), [3 * maps[0]])
        >>> teacher = Features(torch.zeros(4, 10), torch.zeros(4, 8), maps)
        >>> SP()(student, teacher, batch=None).item() < 1e-9
        True
    """

    info = LossInfo(
        name="sp",
        group="relations",
        compares="pairwise similarities of the last maps in a batch",
        paper="Tung & Mori, ICCV 2019",
        url="https://arxiv.org/abs/1907.09682",
        cost="n² d",
    )

    reads_maps = True

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return similarity_preserving(deepest(student, "student"), deepest(teacher, "teacher"))


def relational_distances(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the pairwise distances of two batches, each normalized by its mean.

    .. math:: \frac{1}{n^2} \sum_{i,j} h(d^s_{ij} / \bar d^s - d^t_{ij} / \bar d^t)

    where h is the Huber loss and :math:`\bar d` the mean of the nonzero distances.

    Args:
        student: Embeddings, (n, d).
        teacher: Embeddings, (n, d'); the width may differ.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batch sizes differ, or a tensor is not floating-point.

    References:
        Relational Knowledge Distillation (Park et al., CVPR 2019)
        https://arxiv.org/abs/1904.05068

    Examples:
        >>> import torch
        >>> line = torch.tensor([[0.0], [1.0], [2.0]])
        >>> relational_distances(10 - 5 * line, line)
        tensor(0.)
    """
    check_shapes("batches", student, teacher, 1, EMBEDDINGS)
    return F.smooth_l1_loss(_scaled_distances(student), _scaled_distances(teacher))


def _scaled_distances(points: Tensor) -> Tensor:
    distances = (points[:, None] - points).norm(dim=2)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return bounded_divide(distances, mean)


def relational_angles(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the angles of all triplets of samples of two batches.

    .. math:: \frac{1}{n^3} \sum_{i,j,k} h(\cos \angle^s_{jik} - \cos \angle^t_{jik})

    where h is the Huber loss and :math:`\angle_{jik}` the angle at sample i between j and k; its
    cosine is 0 where two of them coincide. The computation takes :math:`n^3 d` operations and
    memory for :math:`n^3 + n^2 d` numbers per network.

    Args:
        student: Embeddings, (n, d).
        teacher: Embeddings, (n, d'); the width may differ.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batch sizes differ, or a tensor is not floating-point.

    References:
        Relational Knowledge Distillation (Park et al., CVPR 2019)
        https://arxiv.org/abs/1904.05068

    Examples:
        >>> import torch
        >>> corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> relational_angles(10 - 5 * corner.flip(1), corner).item() < 1e-9
        True
    """
    check_shapes("batches", student, teacher, 1, EMBEDDINGS)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _cosines(points: Tensor) -> Tensor:
    unit = directions(points - points[:, None])  # [i, j]: from sample i to sample j
    return unit @ unit.mT


class RKD(Loss):
    """:func:`relational_distances` and :func:`relational_angles` of the embeddings, RKD.

    Args:
        distance: Weight of the distances.
        angle: Weight of the angles, which are not computed if it is 0.

    Raises:
        ValueError: If a weight is negative.

    References:
        Relational Knowledge Distillation (Park et al., CVPR 2019)
        https://arxiv.org/abs/1904.05068

    Examples:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> student = Features(torch.zeros(3, 10), 5 * points)
        >>> teacher = Features(torch.zeros(3, 10), points)
        >>> RKD(distance=1.0, angle=2.0)(student, teacher, batch=None).item() < 1e-9
        True
    """

    info = LossInfo(
        name="rkd",
        group="relations",
        compares="distances and angles within a batch of embeddings",
        paper="Park et al., CVPR 2019",
        url="https://arxiv.org/abs/1904.05068",
        cost="n³ d, with n³ + n² d numbers of memory",
    )

    def __init__(self, *, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__()
        self.distance, self.angle = not_negative("distance", distance), not_negative("angle", angle)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        s, t = student.embedding, teacher.embedding
        value = self.distance * relational_distances(s, t)
        return value + self.angle * relational_angles(s, t) if self.angle else value


def probabilistic_transfer(student: Tensor, teacher: Tensor, *, epsilon: float = 1e-7) -> Tensor:
    r"""Compares the conditional neighbor probabilities of the samples of a batch.

    .. math:: \frac{1}{n^2} \sum_{i,j} P^t_{ij} \log \frac{P^t_{ij} + \epsilon}{P^s_{ij} +
        \epsilon}, \qquad P_{ij} = \frac{S_{ij}}{\sum_k S_{ik}}, \quad
        S_{ij} = \frac{1 + \cos(f_i, f_j)}{2}

    As in the authors' code, the mean is over all :math:`n^2` pairs, including i = j.

    Args:
        student: Embeddings f, (n, d).
        teacher: Embeddings f, (n, d'); the width may differ.
        epsilon: Constant :math:`\epsilon` that keeps the logarithm finite.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batch sizes differ, a tensor is not floating-point, or ``epsilon`` is not
            positive.

    References:
        Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis & Tefas,
        ECCV 2018)
        https://arxiv.org/abs/1803.10837

    Examples:
        >>> import torch
        >>> rows = torch.eye(3)
        >>> probabilistic_transfer(7 * rows, rows)  # invariant to scale
        tensor(0.)
    """
    check_shapes("batches", student, teacher, 1, EMBEDDINGS)
    positive("epsilon", epsilon)
    units = (directions(embedding) for embedding in (student, teacher))
    similar = ((1 + unit @ unit.T) / 2 for unit in units)
    s, t = (rows / rows.sum(1, keepdim=True) for rows in similar)
    return (t * ((t + epsilon) / (s + epsilon)).log()).mean()


class PKT(Loss):
    """:func:`probabilistic_transfer` of the embeddings, PKT.

    References:
        Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis & Tefas,
        ECCV 2018)
        https://arxiv.org/abs/1803.10837

    Examples:
        >>> import torch
        >>> student = Features(torch.zeros(3, 10), 7 * torch.eye(3))
        >>> teacher = Features(torch.zeros(3, 10), torch.eye(3))
        >>> PKT()(student, teacher, batch=None)
        tensor(0.)
    """

    info = LossInfo(
        name="pkt",
        group="relations",
        compares="conditional neighbor probabilities in a batch of embeddings",
        paper="Passalis & Tefas, ECCV 2018",
        url="https://arxiv.org/abs/1803.10837",
        cost="n² d",
    )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return probabilistic_transfer(student.embedding, teacher.embedding)
