"""Losses on how the samples of a batch lie to one another."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._validation import EMBEDDINGS, check_shapes, count, not_negative, one_of, positive
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import deepest
from topkd.topology.gradient import SMALL, bounded_divide

Form = Literal["products", "kernel"]


def directions(vectors: Tensor, small: float = SMALL) -> Tensor:
    """Divides vectors (..., d) by their norms; 0 stays 0, and below ``small`` slopes are bounded.

    Examples:
        >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return bounded_divide(vectors, vectors.norm(dim=-1, keepdim=True), small)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares which samples of a batch are alike.

    .. math:: \frac{1}{n^2} \lVert G^s - G^t \rVert^2, \qquad
        G_{i} = (F F^\top)_{i} \,/\, \lVert (F F^\top)_{i} \rVert

    where the row :math:`F_i` is all that a network made of sample i. The scale of F is not seen.

    Args:
        student: :math:`F^s`, (n, ...); further dimensions are flattened.
        teacher: :math:`F^t`, (n, ...); it may be of another size.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batches differ in size or are no floats.

    References:
        Similarity-Preserving Knowledge Distillation (Tung & Mori, ICCV 2019)
        https://arxiv.org/abs/1907.09682

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> similarity_preserving(3 * rows, rows)
        tensor(0.)
        >>> similarity_preserving(torch.ones(2, 1), rows)  # both samples the same
        tensor(0.2929)
    """
    check_shapes("batches", student, teacher, 1)
    s, t = student.flatten(1), teacher.flatten(1)
    own, aim = (directions(m @ m.T, SMALL**2) for m in (s, t))
    return F.mse_loss(own, aim)


class SP(Loss):
    """:func:`similarity_preserving` of the last maps (SP).

    References:
        Similarity-Preserving Knowledge Distillation (Tung & Mori, ICCV 2019)
        https://arxiv.org/abs/1907.09682
    """

    info = LossInfo(
        name="sp",
        group="relations",
        compares="which images of a batch have like maps",
        paper="Tung & Mori, ICCV 2019",
        url="https://arxiv.org/abs/1907.09682",
        cost="n² d",
    )

    reads_maps = True

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return similarity_preserving(deepest(student, "student"), deepest(teacher, "teacher"))


def correlation_products(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares embeddings of the same width, by products over pairs of samples.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} \sum_k \Delta_{ik} \Delta_{jk}, \qquad
        \Delta = \lvert e^s - e^t \rvert

    The authors' code takes neighbors in the batch for the pairs (i, j), so that its value depends
    on the order of the batch. The mean over all pairs is its mean over all orders.

    Args:
        student: :math:`e^s`, (n, d).
        teacher: :math:`e^t`, (n, d).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes differ, or there are no two samples.

    References:
        Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019)
        https://arxiv.org/abs/1904.01802

    Examples:
        >>> correlation_products(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]]))
        tensor(3.)
    """
    check_shapes("embeddings", student, teacher, form=EMBEDDINGS)
    if len(student) < 2:
        raise ValueError(f"embeddings must be of two samples at least, got {tuple(student.shape)}")
    n, gap = len(student), (student - teacher).abs()
    return (gap.sum(0).square() - gap.square().sum(0)).sum() / (n * (n - 1))


def correlation_kernel(
    student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2
) -> Tensor:
    r"""Compares the kernel matrices of two batches of embeddings.

    .. math:: \frac{1}{n^2} \lVert K^s - K^t \rVert^2, \qquad
        K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (u_i \cdot u_j)^p

    the Gaussian kernel :math:`\exp(-\gamma \lVert u_i - u_j \rVert^2)` of the directions
    :math:`u = e / \lVert e \rVert`, expanded to the order P. torchdistill takes the norm without
    its square; this is the paper's.

    Args:
        student: Embeddings e, (n, d).
        teacher: Embeddings e, (n, d'); the width may differ.
        gamma: :math:`\gamma`.
        order: P.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batches differ in size or are no floats.

    References:
        Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019)
        https://arxiv.org/abs/1904.01802
    """
    check_shapes("batches", student, teacher, 1, EMBEDDINGS)
    positive("gamma", gamma)
    count("order", order)
    return F.mse_loss(_kernel(student, gamma, order), _kernel(teacher, gamma, order))


def _kernel(embedding: Tensor, gamma: float, order: int) -> Tensor:
    unit = directions(embedding)
    powers = [(2 * gamma * unit @ unit.T) ** p / math.factorial(p) for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(powers).sum(0)


class CC(Loss):
    """:func:`correlation_products` or :func:`correlation_kernel` of the embeddings (CC).

    They are different losses: the products are those of the code that the authors gave to
    RepDistiller, of linear embeddings of both networks, which are trained; the kernel is the
    published form, here of the embeddings as they are.

    Args:
        form: Which of the two.
        size: Of the products' embeddings.
        gamma: Of the kernel.
        order: Of the kernel.

    References:
        Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019)
        https://arxiv.org/abs/1904.01802
    """

    info = LossInfo(
        name="cc",
        group="relations",
        compares="embeddings, by products or a kernel over pairs of images",
        paper="Peng et al., ICCV 2019",
        url="https://arxiv.org/abs/1904.01802",
        cost="n d, two projections; as a kernel n² d",
        zero=False,
    )

    def __init__(
        self,
        *,
        form: Form = "products",
        size: int = 128,
        gamma: float = 0.4,
        order: int = 2,
    ) -> None:
        super().__init__()
        self.form, self.gamma = one_of("form", form, Form), positive("gamma", gamma)
        self.size, self.order = count("size", size), count("order", order)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates the linear embeddings of both networks, for the products."""
        if self.form == "products":
            self.student = nn.Linear(student.embedding.shape[1], self.size)
            self.teacher = nn.Linear(teacher.embedding.shape[1], self.size)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        s, t = student.embedding, teacher.embedding
        if self.form == "products":
            return correlation_products(self.student(s), self.teacher(t))
        return correlation_kernel(s, t, gamma=self.gamma, order=self.order)


def relational_distances(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares the distances within two batches, each divided by their mean.

    .. math:: \frac{1}{n^2} \sum_{i,j} h(d^s_{ij} / \bar d^s - d^t_{ij} / \bar d^t)

    where h is the Huber loss and the mean :math:`\bar d` is that of the distances above 0.

    Args:
        student: Embeddings, (n, d).
        teacher: Embeddings, (n, d'); the width may differ.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batches differ in size or are no floats.

    References:
        Relational Knowledge Distillation (Park et al., CVPR 2019)
        https://arxiv.org/abs/1904.05068

    Examples:
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
    r"""Compares the angles within two batches.

    .. math:: \frac{1}{n^3} \sum_{i,j,k} h(\cos \angle^s_{jik} - \cos \angle^t_{jik})

    where h is the Huber loss and :math:`\angle_{jik}` the angle at sample i between j and k; its
    cosine is 0 where two of them coincide. It takes :math:`n^3 d` steps, and
    :math:`n^3 + n^2 d` numbers of memory for each network.

    Args:
        student: Embeddings, (n, d).
        teacher: Embeddings, (n, d'); the width may differ.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batches differ in size or are no floats.

    References:
        Relational Knowledge Distillation (Park et al., CVPR 2019)
        https://arxiv.org/abs/1904.05068

    Examples:
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
    """:func:`relational_distances` and :func:`relational_angles` of the embeddings (RKD).

    Args:
        distance: Weight of the distances.
        angle: Weight of the angles; at 0 they are not computed.

    References:
        Relational Knowledge Distillation (Park et al., CVPR 2019)
        https://arxiv.org/abs/1904.05068
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
    r"""Compares how likely each sample of a batch is to be taken for each other.

    .. math:: \frac{1}{n^2} \sum_{i,j} P^t_{ij} \log \frac{P^t_{ij} + \epsilon}{P^s_{ij} +
        \epsilon}, \qquad P_{ij} = \frac{S_{ij}}{\sum_k S_{ik}}, \quad
        S_{ij} = \frac{1 + \cos(f_i, f_j)}{2}

    The mean is that of the authors' code, over all :math:`n^2` pairs, i = j among them.

    Args:
        student: Embeddings f, (n, d).
        teacher: Embeddings f, (n, d'); the width may differ.
        epsilon: Keeps the logarithm finite.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batches differ in size or are no floats.

    References:
        Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis & Tefas,
        ECCV 2018)
        https://arxiv.org/abs/1803.10837

    Examples:
        >>> rows = torch.eye(3)
        >>> probabilistic_transfer(7 * rows, rows)  # it sees no lengths
        tensor(0.)
    """
    check_shapes("batches", student, teacher, 1, EMBEDDINGS)
    positive("epsilon", epsilon)
    units = (directions(embedding) for embedding in (student, teacher))
    similar = ((1 + unit @ unit.T) / 2 for unit in units)
    s, t = (rows / rows.sum(1, keepdim=True) for rows in similar)
    return (t * ((t + epsilon) / (s + epsilon)).log()).mean()


class PKT(Loss):
    """:func:`probabilistic_transfer` of the embeddings (PKT).

    References:
        Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis & Tefas,
        ECCV 2018)
        https://arxiv.org/abs/1803.10837
    """

    info = LossInfo(
        name="pkt",
        group="relations",
        compares="which image of a batch would be taken for which",
        paper="Passalis & Tefas, ECCV 2018",
        url="https://arxiv.org/abs/1803.10837",
        cost="n² d",
    )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return probabilistic_transfer(student.embedding, teacher.embedding)
