"""Losses on relations between the samples of a batch."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._validation import (
    EMBEDDINGS,
    check_shapes,
    count,
    not_negative,
    one_of,
    positive,
    refuse_unused,
)
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import deepest
from topkd.topology.gradient import SMALL, bounded_divide

Form = Literal["products", "neighbors", "kernel"]


def directions(vectors: Tensor, small: float = SMALL) -> Tensor:
    """Normalizes vectors to unit length, with a bounded gradient near zero.

    Zero vectors stay zero.

    Args:
        vectors: (..., d).
        small: Norm below which the gradient is bounded.

    Returns:
        Unit vectors, (..., d).

    Examples:
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


def correlation_products(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares embeddings of the same width by products of differences over pairs of samples.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} \sum_k \Delta_{ik} \Delta_{jk}, \qquad
        \Delta = \lvert e^s - e^t \rvert

    The mean over all pairs does not depend on the order of the batch. It equals the mean of
    :func:`neighbor_products`, the authors' code, over all orders.

    Args:
        student: :math:`e^s`, (n, d).
        teacher: :math:`e^t`, (n, d).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes differ, or there are fewer than two samples.

    References:
        Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019)
        https://arxiv.org/abs/1904.01802

    Examples:
        >>> correlation_products(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]]))
        tensor(3.)
    """
    delta = _differences(student, teacher)
    n = len(delta)
    return (delta.sum(0).square() - delta.square().sum(0)).sum() / (n * (n - 1))


def neighbor_products(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares embeddings of the same width by products of differences over neighboring samples.

    .. math:: \frac{1}{n-1} \sum_{i=1}^{n-1} \sum_k \Delta_{ik} \Delta_{i+1,k}, \qquad
        \Delta = \lvert e^s - e^t \rvert

    As in the authors' code, each sample is paired with the next in the batch, so the value depends
    on the order. :func:`correlation_products` pairs all samples.

    Args:
        student: :math:`e^s`, (n, d).
        teacher: :math:`e^t`, (n, d).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes differ, or there are fewer than two samples.

    References:
        Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019)
        https://arxiv.org/abs/1904.01802

    Examples:
        >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
        >>> neighbor_products(rows, torch.zeros(3, 1))  # (1 * 2 + 2 * 3) / 2
        tensor(4.)
    """
    delta = _differences(student, teacher)
    return (delta[:-1] * delta[1:]).sum(1).mean()


def _differences(student: Tensor, teacher: Tensor) -> Tensor:
    check_shapes("embeddings", student, teacher, form=EMBEDDINGS)
    if len(student) < 2:
        raise ValueError(f"embeddings must be of at least two samples, got {tuple(student.shape)}")
    return (student - teacher).abs()


def correlation_kernel(
    student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2
) -> Tensor:
    r"""Compares the kernel matrices of two batches of embeddings.

    .. math:: \frac{1}{n^2} \lVert K^s - K^t \rVert^2, \qquad
        K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (u_i \cdot u_j)^p

    K is the Taylor expansion, to order P, of the Gaussian kernel
    :math:`\exp(-\gamma \lVert u_i - u_j \rVert^2)` of the unit vectors
    :math:`u = e / \lVert e \rVert`. The square of the norm follows the paper; torchdistill omits
    it.

    Args:
        student: Embeddings e, (n, d).
        teacher: Embeddings e, (n, d'); the width may differ.
        gamma: Kernel parameter :math:`\gamma`.
        order: Order P of the expansion.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the batch sizes differ, a tensor is not floating-point, or an option is out
            of range.

    References:
        Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019)
        https://arxiv.org/abs/1904.01802

    Examples:
        >>> rows = torch.eye(3)
        >>> correlation_kernel(7 * rows, rows).item()  # invariant to scale
        0.0
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
    """Products of differences, or :func:`correlation_kernel`, of the embeddings, CC.

    The products and the kernel are different losses. :func:`neighbor_products` are those of the
    code that the authors contributed to RepDistiller; :func:`correlation_products` are their mean
    over all orders of the batch. Both use trained linear embeddings of both networks. The kernel is
    the published form; here it uses the embeddings directly.

    Args:
        form: "products" of all pairs of images, of "neighbors" in the batch only, or "kernel".
        size: Width of the linear embeddings, for products and neighbors.
        gamma: Parameter of the kernel.
        order: Order of the expansion of the kernel.

    Raises:
        ValueError: If an option is out of range, or has no effect with this form.

    References:
        Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019)
        https://arxiv.org/abs/1904.01802

    Examples:
        >>> student = Features(torch.zeros(4, 10), torch.rand(4, 8))
        >>> teacher = Features(torch.zeros(4, 10), torch.rand(4, 32))
        >>> loss = CC(size=16)
        >>> loss.setup(student, teacher, context=None)
        >>> loss.teacher
        Linear(in_features=32, out_features=16, bias=True)
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
        unused = ("size",) if form == "kernel" else ("gamma", "order")
        refuse_unused(self.options, unused, f"form: {form}")

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates the linear embeddings of both networks, for the products."""
        if self.form != "kernel":
            self.student = nn.Linear(student.embedding.shape[1], self.size)
            self.teacher = nn.Linear(teacher.embedding.shape[1], self.size)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        s, t = student.embedding, teacher.embedding
        if self.form == "kernel":
            return correlation_kernel(s, t, gamma=self.gamma, order=self.order)
        compare = correlation_products if self.form == "products" else neighbor_products
        return compare(self.student(s), self.teacher(t))


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
