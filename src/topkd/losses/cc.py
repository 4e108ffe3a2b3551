"""Correlation congruence: products of differences, or kernels, over pairs of images, CC."""

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
    one_of,
    positive,
    refuse_unused,
)
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.relations import directions

Form = Literal["products", "neighbors", "kernel"]


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
