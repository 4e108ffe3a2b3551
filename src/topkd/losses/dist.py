"""Correlations of predictions over classes and over images, DIST."""

import torch
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import (
    LOGITS,
    check_shapes,
    not_negative,
)
from topkd.losses._validation import temperature as checked
from topkd.losses.base import Loss, LossInfo

MIN_RELATIVE_NORM = 0.01  # of centered predictions, relative to their norm; trained ones exceed it


def correlation_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    damping: float = 1e-8,
) -> Tensor:
    r"""Compares predictions up to shift and scale, across classes and across images.

    .. math:: T^2 \Big[ \beta \Big(1 - \frac{1}{n} \sum_i \rho(p^s_{i \cdot}, p^t_{i \cdot})\Big)
        + \gamma \Big(1 - \frac{1}{c} \sum_j \rho(p^s_{\cdot j}, p^t_{\cdot j})\Big) \Big]

    where :math:`\rho` is Pearson's correlation and :math:`p = \mathrm{softmax}(z / T)`. The first
    sum is the inter-class relation, the second the intra-class relation.

    The authors' code adds 1e-8 to the denominator of :math:`\rho`, as here. The constant reduces
    the weight of classes that no image of the batch resembles; as a result, the loss is above 0 for
    a student that equals its teacher. torchdistill bounds each of both norms below by 1e-8 instead,
    which reduces the weight of fewer classes. The difference grows with the range of the logits:
    for 64 images, 100 classes and normal logits with standard deviation 30, a student that equals
    its teacher has a loss of about 0.25 here, and of about 0.08 in torchdistill.

    The norm of centered probabilities is bounded below by 0.01 of the norm of the probabilities.
    The bound is active where z / T varies by less than 0.01. It does not change trained networks,
    and keeps gradients moderate where a student predicts the same for all images or classes.

    Args:
        student: Logits :math:`z^s`, (n, classes).
        teacher: Logits :math:`z^t`, (n, classes).
        beta: Weight of the inter-class relation.
        gamma: Weight of the intra-class relation.
        temperature: T, ``tau`` in the authors' code; 1e-6 to 100.
        damping: Constant added to the denominator; 0 gives the formula of the paper.

    Returns:
        The loss, a scalar. The correlation with a constant vector counts as 0.

    Raises:
        ValueError: If the logits differ in shape or are not floating-point, or an option is out
            of range.

    References:
        Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022)
        https://arxiv.org/abs/2205.10536

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]])
        >>> flatter = (0.5 * logits.softmax(1) + 0.5 / 3).log()  # mixed with uniform predictions
        >>> correlation_distillation(flatter, logits).abs().item() < 1e-5
        True
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    not_negative("beta", beta)
    not_negative("gamma", gamma)
    not_negative("damping", damping)
    checked(temperature)
    s, t = ((z / temperature).softmax(1) for z in (student, teacher))
    images, classes = _correlation(s, t, damping), _correlation(s.T, t.T, damping)
    return temperature**2 * (beta * (1 - images.mean()) + gamma * (1 - classes.mean()))


def _correlation(first: Tensor, second: Tensor, damping: float) -> Tensor:
    """Computes Pearson's correlation of corresponding rows, (rows,)."""
    a, b = (x - x.mean(1, keepdim=True) for x in (first, second))
    lengths = _length(a, first) * _length(b, second)
    # Below this, gradients would overflow; a row of zeros must not give NaN.
    varies = lengths > 1e-18
    return (a * b).sum(1) / (lengths + damping).where(varies, lengths.new_ones(()))


def _length(centered: Tensor, rows: Tensor) -> Tensor:
    return torch.maximum(centered.norm(dim=1), MIN_RELATIVE_NORM * rows.norm(dim=1))


class DIST(Loss):
    """:func:`correlation_distillation` of the logits, DIST.

    The authors use T = 1 and weight 1 for each relation, and T = 4 and weight 2 (their ``dist_t4``)
    for CIFAR-100.

    Args:
        beta: Weight of the inter-class relation.
        gamma: Weight of the intra-class relation.
        temperature: Softmax temperature T, 1e-6 to 100.
        damping: Constant in the denominator, which reduces the weight of classes that no image
            resembles; 0 gives the formula of the paper.

    Raises:
        ValueError: If an option is out of range.

    References:
        Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022)
        https://arxiv.org/abs/2205.10536

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]])
        >>> features = Features(logits, logits)
        >>> DIST(beta=2.0)(features, features, batch=None).item() < 1e-5
        True
    """

    info = LossInfo(
        name="dist",
        group="logits",
        compares="predictions up to shift and scale, per image and per class",
        paper="Huang et al., NeurIPS 2022",
        url="https://arxiv.org/abs/2205.10536",
        cost="n c",
        zero=False,
    )

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        damping: float = 1e-8,
    ) -> None:
        super().__init__()
        self.beta, self.gamma = not_negative("beta", beta), not_negative("gamma", gamma)
        self.temperature = checked(temperature)
        self.damping = not_negative("damping", damping)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return correlation_distillation(
            student.logits,
            teacher.logits,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            damping=self.damping,
        )
