"""Losses on logits that separate the target class from the other classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import LOGITS, check_shapes, check_target, not_negative
from topkd.losses._validation import temperature as checked
from topkd.losses.base import Loss, LossInfo
from topkd.losses.logits import standardized


def non_target_logits(logits: Tensor, target: Tensor) -> Tensor:
    """Removes the logit of the target class.

    Args:
        logits: (n, classes).
        target: Labels, (n,).

    Returns:
        Logits of the other classes in their order, (n, classes - 1).

    Examples:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> non_target_logits(logits, torch.tensor([1, 2]))
        tensor([[1., 3.],
                [4., 5.]])
    """
    place = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, place + (place >= target[:, None]))


def decoupled_distillation(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
) -> Tensor:
    r"""Compares the target-class confidence and the distribution over the other classes separately.

    .. math:: \frac{T^2}{n} \sum_i \alpha\, \mathrm{KL}\big(b^t_i \,\|\, b^s_i\big)
        + \beta\, \mathrm{KL}\big(q^t_i \,\|\, q^s_i\big)

    where :math:`b = (p_y, 1 - p_y)` with :math:`p = \mathrm{softmax}(z / T)`, and q is the softmax
    of :math:`z / T` over the classes other than the label y.
    :func:`~topkd.losses.logits.distillation` is the special case :math:`\alpha = 1` and
    :math:`\beta = 1 - p^t_y`.

    Args:
        student: Logits :math:`z^s`, (n, classes).
        teacher: Logits :math:`z^t`, (n, classes).
        target: Labels y, (n,).
        alpha: Weight of the target-class term.
        beta: Weight of the non-target-class term.
        temperature: Softmax temperature T, 1e-6 to 100.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are not floating-point, a label is not one of
            the classes, or an option is out of range.

    References:
        Decoupled Knowledge Distillation (Zhao et al., CVPR 2022)
        https://arxiv.org/abs/2203.08679

    Examples:
        >>> teacher = torch.tensor([[0.0, 1.0, 5.0]])
        >>> student = torch.tensor([[0.0, 1.0, 9.0]])  # differs in the target class, 2, only
        >>> decoupled_distillation(student, teacher, torch.tensor([2]), alpha=0.0).item()
        0.0
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    check_target(target, student)
    checked(temperature)
    not_negative("alpha", alpha)
    not_negative("beta", beta)
    scaled = [z / temperature for z in (student, teacher)]
    rests = [non_target_logits(z, target) for z in scaled]
    log_b = []
    for z, rest in zip(scaled, rests, strict=True):
        odds = z.gather(1, target[:, None]) - rest.logsumexp(1, keepdim=True)
        log_b.append(F.logsigmoid(torch.cat([odds, -odds], 1)))
    log_q = [rest.log_softmax(1) for rest in rests]
    losses = [
        F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
        for log_s, log_t in (log_b, log_q)
    ]
    return temperature**2 * (alpha * losses[0] + beta * losses[1])


class DKD(Loss):
    """:func:`decoupled_distillation` of the logits, DKD.

    For mixed images, the label with the largest weight is the target. The authors use a
    warm-up of 20 epochs and ``beta`` 2 for resnet56 to resnet20 and resnet110 to resnet32, 6 for
    vgg13 and the pairs of WRNs, and 8 for resnet32x4 and ResNet50; on ImageNet, they use T = 1, a
    warm-up of 1 epoch and ``beta`` 0.5 for ResNet34 to ResNet18. With standardized logits, Sun et
    al. multiply both weights by 9 and use T = 2; for resnet56 to resnet20, by 18 with T = 3.

    Args:
        alpha: Weight of the target-class term.
        beta: Weight of the non-target-class term.
        temperature: Softmax temperature T, 1e-6 to 100.
        standardize: Whether to compare :func:`~topkd.losses.logits.standardized` logits.

    Raises:
        ValueError: If an option is out of range.

    References:
        Decoupled Knowledge Distillation (Zhao et al., CVPR 2022)
        https://arxiv.org/abs/2203.08679
        Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024)
        https://arxiv.org/abs/2403.01427

    Examples:
        >>> logits = torch.tensor([[0.0, 1.0, 5.0]])
        >>> features = Features(logits, embedding=logits)
        >>> batch = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([2]), torch.tensor([0]))
        >>> DKD(beta=2.0)(features, features, batch).item()
        0.0
    """

    info = LossInfo(
        name="dkd",
        group="logits",
        compares="softened predictions, target and other classes separately",
        paper="Zhao et al., CVPR 2022",
        url="https://arxiv.org/abs/2203.08679",
        cost="n c",
    )

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.beta = not_negative("alpha", alpha), not_negative("beta", beta)
        self.temperature = checked(temperature)
        self.standardize = standardize

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        logits = student.logits, teacher.logits
        s, t = map(standardized, logits) if self.standardize else logits
        return decoupled_distillation(
            s, t, batch.target, alpha=self.alpha, beta=self.beta, temperature=self.temperature
        )


def normalized_distillation(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    r"""Adds the cross-entropies with the teacher on the target class and on the other classes.

    .. math:: -\frac{1}{n} \sum_i \Big[ p^t_{iy} \log p^s_{iy}
        + \gamma T^2 \sum_{j \ne y} q^t_{ij} \log q^s_{ij} \Big]

    where :math:`p = \mathrm{softmax}(z)` and q is the softmax of :math:`z / T` over the classes
    other than the label y. Both terms are cross-entropies, so the loss is not 0 for a student that
    equals its teacher.

    The implementation follows the authors' code. A copy in the SDD repository keeps the label in q;
    results quoted from there belong to a different loss.

    Args:
        student: Logits :math:`z^s`, (n, classes).
        teacher: Logits :math:`z^t`, (n, classes).
        target: Labels y, (n,).
        gamma: Weight of the other classes.
        temperature: Softmax temperature T of the other classes, 1e-6 to 100.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are not floating-point, a label is not one of
            the classes, or an option is out of range.

    References:
        From Knowledge Distillation to Self-Knowledge Distillation (Yang et al., ICCV 2023)
        https://arxiv.org/abs/2303.13005

    Examples:
        >>> confident, uniform = torch.tensor([[99.0, 0.0, 0.0]]), torch.zeros(1, 3)
        >>> loss = normalized_distillation(uniform, confident, torch.tensor([0]), gamma=0.0)
        >>> round(loss.exp().item(), 4)
        3.0
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    check_target(target, student)
    checked(temperature)
    not_negative("gamma", gamma)
    label = target[:, None]
    log_s, log_t = (z.log_softmax(1).gather(1, label) for z in (student, teacher))
    rest_s, rest_t = (non_target_logits(z, target) / temperature for z in (student, teacher))
    rest = (rest_t.softmax(1) * rest_s.log_softmax(1)).sum(1)
    return -(log_t.exp() * log_s).mean() - gamma * temperature**2 * rest.mean()


class NKD(Loss):
    """:func:`normalized_distillation` of the logits, NKD.

    For mixed images, the label with the largest weight is the target. The defaults are those for
    ImageNet; for CIFAR-100, the authors use ``gamma`` 3.5 and T = 3.

    Args:
        gamma: Weight of the other classes.
        temperature: Softmax temperature T of the other classes, 1e-6 to 100.

    Raises:
        ValueError: If an option is out of range.

    References:
        From Knowledge Distillation to Self-Knowledge Distillation (Yang et al., ICCV 2023)
        https://arxiv.org/abs/2303.13005

    Examples:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[99.0, 0.0, 0.0]])
        >>> batch = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([0]), torch.tensor([0]))
        >>> NKD(gamma=0.0)(Features(student, student), Features(teacher, teacher), batch)  # log 3
        tensor(1.0986)
    """

    info = LossInfo(
        name="nkd",
        group="logits",
        compares="predictions, target and other classes separately",
        paper="Yang et al., ICCV 2023",
        url="https://arxiv.org/abs/2303.13005",
        cost="n c",
        zero=False,
    )

    def __init__(self, *, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.gamma = not_negative("gamma", gamma)
        self.temperature = checked(temperature)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return normalized_distillation(
            student.logits,
            teacher.logits,
            batch.target,
            gamma=self.gamma,
            temperature=self.temperature,
        )
