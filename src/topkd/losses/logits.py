"""Losses on the logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import (
    LOGITS,
    check_floats,
    check_shapes,
    not_negative,
    positive,
)
from topkd.losses._validation import temperature as checked
from topkd.losses.base import Loss, LossInfo

LEAST_SPREAD = 0.1  # of logits; that of a trained network is greater
LEAST_VARIATION = 0.01  # of predictions, as a share of their norm; likewise


class CE(Loss):
    """Cross-entropy of the student's logits with the labels; needs no teacher.

    Of mixed images it takes the mixed labels.

    Args:
        label_smoothing: Share of the target that is spread over all classes.

    References:
        Rethinking the Inception Architecture (Szegedy et al., CVPR 2016), for the smoothing
        https://arxiv.org/abs/1512.00567
    """

    info = LossInfo(
        name="ce",
        group="logits",
        compares="logits with the labels",
        paper="Szegedy et al., CVPR 2016",
        url="https://arxiv.org/abs/1512.00567",
        cost="n c",
        zero=False,
    )

    needs_teacher = False

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        target = batch.target if batch.soft is None else batch.soft.to(student.logits.dtype)
        return F.cross_entropy(student.logits, target, label_smoothing=self.label_smoothing)


def standardized(logits: Tensor) -> Tensor:
    r"""Gives the logits of every image mean 0 and deviation 1.

    .. math:: \hat z = \frac{z - \mathrm{mean}(z)}{\max(\mathrm{std}(z),\, 0.1) + 10^{-7}}

    with the unbiased deviation over the classes. A loss of these asks a student for the order and
    the proportions of its teacher's logits, and leaves it their range.

    The authors' code has no such least deviation. It changes nothing in a trained network, whose
    logits spread more widely, and keeps the slope below 10 where a student starts with all its
    logits at 0, as heads of vision transformers do: there, that of the code is 10 million.

    Args:
        logits: (n, classes).

    Returns:
        (n, classes).

    Raises:
        ValueError: If the logits are no floats (n, classes).

    References:
        Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024)
        https://arxiv.org/abs/2403.01427

    Examples:
        >>> import torch
        >>> standardized(torch.tensor([[1.0, 2.0, 3.0], [10.0, 30.0, 50.0]]))
        tensor([[-1.0000,  0.0000,  1.0000],
                [-1.0000,  0.0000,  1.0000]])
    """
    check_floats("logits", logits, LOGITS)
    deviation = logits.std(1, keepdim=True).clamp(min=LEAST_SPREAD) + 1e-7
    return (logits - logits.mean(1, keepdim=True)) / deviation


def distillation(student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 4.0) -> Tensor:
    r"""Compares the softened predictions of two networks.

    .. math:: \frac{T^2}{n} \sum_i \mathrm{KL}\big(p^{t}_{i} \,\|\, p^{s}_{i}\big),
        \qquad p = \mathrm{softmax}(z / T)

    Args:
        student: Logits :math:`z^s`, (n, classes).
        teacher: Logits :math:`z^t`, (n, classes).
        temperature: T; the greater, the more the unlikely classes count.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are no floats, or an option is out of range.

    References:
        Distilling the Knowledge in a Neural Network (Hinton et al., 2014)
        https://arxiv.org/abs/1503.02531

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> distillation(logits + 5, logits).abs().item() < 1e-6  # it sees only differences
        True
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    checked(temperature)
    log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class KD(Loss):
    """:func:`distillation` of the logits.

    Args:
        temperature: T; the greater, the more the unlikely classes count.
        standardize: Whether to compare :func:`standardized` logits; published with T = 2 and
            weight 9 beside 0.1 of cross-entropy.

    References:
        Distilling the Knowledge in a Neural Network (Hinton et al., 2014)
        https://arxiv.org/abs/1503.02531
        Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024)
        https://arxiv.org/abs/2403.01427
    """

    info = LossInfo(
        name="kd",
        group="logits",
        compares="softened predictions",
        paper="Hinton et al. 2014",
        url="https://arxiv.org/abs/1503.02531",
        cost="n c",
    )

    def __init__(self, *, temperature: float = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = checked(temperature)
        self.standardize = standardize

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        logits = student.logits, teacher.logits
        s, t = map(standardized, logits) if self.standardize else logits
        return distillation(s, t, temperature=self.temperature)


def correlation_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    damping: float = 1e-8,
) -> Tensor:
    r"""Compares predictions up to shift and scale, within every image and within every class.

    .. math:: T^2 \Big[ \beta \Big(1 - \frac{1}{n} \sum_i \rho(p^s_{i \cdot}, p^t_{i \cdot})\Big)
        + \gamma \Big(1 - \frac{1}{c} \sum_j \rho(p^s_{\cdot j}, p^t_{\cdot j})\Big) \Big]

    where :math:`\rho` is Pearson's correlation and :math:`p = \mathrm{softmax}(z / T)`.

    The code of the authors and all that follow it add 1e-8 to the product of the two lengths that
    :math:`\rho` divides by. That is followed: it takes weight from classes that no image of the
    batch resembles, and it lets a student lose a little that equals its teacher.

    A length counts as 0.01 of the norm of the probabilities at least, below which it is where
    z / T varies by less than 0.01. That changes nothing in trained networks, and keeps slopes
    moderate where a student predicts the same for all images or all classes.

    Args:
        student: Logits :math:`z^s`, (n, classes).
        teacher: Logits :math:`z^t`, (n, classes).
        beta: Weight of the images, or inter-class relation.
        gamma: Weight of the classes, or intra-class relation.
        temperature: T; the code of the authors has none, re-implementations do.
        damping: What is added to the product of the lengths; 0 is the formula of the paper.

    Returns:
        The loss, a scalar. What does not vary correlates with nothing.

    Raises:
        ValueError: If the logits differ in shape or are no floats, or an option is out of range.

    References:
        Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022)
        https://arxiv.org/abs/2205.10536

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]])
        >>> fainter = (0.5 * logits.softmax(1) + 0.5 / 3).log()  # half of it is a blind guess
        >>> correlation_distillation(fainter, logits).abs().item() < 1e-5
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
    """Computes Pearson's correlation of every two rows, (rows,)."""
    a, b = (x - x.mean(1, keepdim=True) for x in (first, second))
    lengths = _length(a, first) * _length(b, second)
    # Below this, gradients would overflow; a row of zeros must not give NaN.
    varies = lengths > 1e-18
    return (a * b).sum(1) / (lengths + damping).where(varies, lengths.new_ones(()))


def _length(centered: Tensor, rows: Tensor) -> Tensor:
    return torch.maximum(centered.norm(dim=1), LEAST_VARIATION * rows.norm(dim=1))


class DIST(Loss):
    """:func:`correlation_distillation` of the logits, DIST.

    Args:
        beta: Weight of the images.
        gamma: Weight of the classes.
        temperature: T.
        damping: Takes weight from classes that no image resembles; 0 is the paper's formula.

    References:
        Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022)
        https://arxiv.org/abs/2205.10536
    """

    info = LossInfo(
        name="dist",
        group="logits",
        compares="predictions up to scale, within images and within classes",
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


def transformed_teacher_matching(
    student: Tensor, teacher: Tensor, *, exponent: float = 0.1, weighted: bool = False
) -> Tensor:
    r"""Compares the student's own prediction with the softened one of the teacher.

    .. math:: \frac{1}{n} \sum_i u_i\, \mathrm{KL}\big(q_i \,\|\, p^s_i\big),
        \qquad q_i = \frac{(p^t_i)^\kappa}{\sum_j (p^t_{ij})^\kappa}

    with :math:`u_i = 1`, or weighted :math:`u_i = \sum_j (p^t_{ij})^\kappa`: images of which the
    teacher is less sure count more. All p are softmax at temperature 1.

    Args:
        student: Logits, (n, classes).
        teacher: Logits, (n, classes).
        exponent: :math:`\kappa`, one over the temperature of the teacher.
        weighted: Whether images weigh differently.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are no floats, or an option is out of range.

    References:
        Knowledge Distillation Based on Transformed Teacher Matching (Zheng & Yang, ICLR 2024)
        https://arxiv.org/abs/2402.11148

    Examples:
        >>> import torch
        >>> teacher = torch.tensor([[0.0, 10.0, 20.0]])
        >>> transformed_teacher_matching(teacher / 10, teacher).item() < 1e-6  # exactly as soft
        True
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    positive("exponent", exponent)
    log_power = exponent * teacher.log_softmax(1)
    log_weight = log_power.logsumexp(1, keepdim=True)
    log_s, log_q = student.log_softmax(1), log_power - log_weight
    divergence = F.kl_div(log_s, log_q, reduction="none", log_target=True).sum(1)
    return (log_weight[:, 0].exp() * divergence if weighted else divergence).mean()


class TTM(Loss):
    """:func:`transformed_teacher_matching` of the logits, TTM.

    Published with weight 45 for vgg13 to vgg8; the temperature has no square in front.

    Args:
        exponent: One over the temperature of the teacher.

    References:
        Knowledge Distillation Based on Transformed Teacher Matching (Zheng & Yang, ICLR 2024)
        https://arxiv.org/abs/2402.11148
    """

    info = LossInfo(
        name="ttm",
        group="logits",
        compares="the prediction with a softened one",
        paper="Zheng & Yang, ICLR 2024",
        url="https://arxiv.org/abs/2402.11148",
        cost="n c",
        zero=False,
    )

    weighted = False

    def __init__(self, *, exponent: float = 0.1) -> None:
        super().__init__()
        self.exponent = positive("exponent", exponent)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return transformed_teacher_matching(
            student.logits, teacher.logits, exponent=self.exponent, weighted=self.weighted
        )


class WTTM(TTM):
    """:func:`transformed_teacher_matching` in which images weigh differently, WTTM.

    Published with weight 4 beside CRD with 0.8.

    Args:
        exponent: One over the temperature of the teacher.

    References:
        Knowledge Distillation Based on Transformed Teacher Matching (Zheng & Yang, ICLR 2024)
        https://arxiv.org/abs/2402.11148
    """

    info = LossInfo(
        name="wttm",
        group="logits",
        compares="the prediction with a softened one, doubtful images more",
        paper="Zheng & Yang, ICLR 2024",
        url="https://arxiv.org/abs/2402.11148",
        cost="n c",
        zero=False,
    )

    weighted = True

    def __init__(self, *, exponent: float = 0.2) -> None:
        super().__init__(exponent=exponent)
