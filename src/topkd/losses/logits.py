"""Losses on logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import (
    LOGITS,
    check_floats,
    check_shapes,
    not_negative,
)
from topkd.losses._validation import exponent as in_range
from topkd.losses._validation import temperature as checked
from topkd.losses.base import Loss, LossInfo

MIN_STD = 0.1  # of logits; trained networks exceed it
MIN_RELATIVE_NORM = 0.01  # of centered predictions, relative to their norm; likewise


class CE(Loss):
    """Cross-entropy of the student's logits with the labels; needs no teacher.

    For mixed images (mixup, CutMix) the soft labels are used.

    Args:
        label_smoothing: Probability mass spread uniformly over all classes, in [0, 1).

    Raises:
        ValueError: If ``label_smoothing`` is not in [0, 1).

    References:
        Rethinking the Inception Architecture (Szegedy et al., CVPR 2016), for the smoothing
        https://arxiv.org/abs/1512.00567

    Examples:
        >>> import torch
        >>> features = Features(logits=torch.zeros(2, 4), embedding=torch.zeros(2, 8))
        >>> batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 3]), torch.arange(2))
        >>> CE(label_smoothing=0.1)(features, features, batch)  # log 4
        tensor(1.3863)
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
    r"""Standardizes the logits of each image to mean 0 and standard deviation 1.

    .. math:: \hat z = \frac{z - \mathrm{mean}(z)}{\max(\mathrm{std}(z),\, 0.1) + 10^{-7}}

    with the unbiased standard deviation over the classes. A loss on standardized logits compares
    their order and proportions and ignores their range.

    The authors' code has no lower bound on the standard deviation. The bound does not change
    trained networks, whose logits vary more. It keeps the slope below 10 where all logits of a
    student are 0 at initialization, as with the heads of vision transformers; without it the slope
    is 10 million.

    Args:
        logits: (n, classes).

    Returns:
        Standardized logits, (n, classes).

    Raises:
        ValueError: If the logits are not floating-point (n, classes).

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
    deviation = logits.std(1, keepdim=True).clamp(min=MIN_STD) + 1e-7
    return (logits - logits.mean(1, keepdim=True)) / deviation


def distillation(student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 4.0) -> Tensor:
    r"""Computes the divergence of the student's softened predictions from the teacher's.

    .. math:: \frac{T^2}{n} \sum_i \mathrm{KL}\big(p^{t}_{i} \,\|\, p^{s}_{i}\big),
        \qquad p = \mathrm{softmax}(z / T)

    Args:
        student: Logits :math:`z^s`, (n, classes).
        teacher: Logits :math:`z^t`, (n, classes).
        temperature: Softmax temperature T, 1e-6 to 100. Higher values increase the weight of
            low-probability classes. The error of the loss in float32 is about
            :math:`5 \cdot 10^{-8}\, T^2`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are not floating-point, or an option is out
            of range.

    References:
        Distilling the Knowledge in a Neural Network (Hinton et al., 2014)
        https://arxiv.org/abs/1503.02531

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> distillation(logits + 5, logits).abs().item() < 1e-6  # invariant to shifts
        True
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    checked(temperature)
    log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class KD(Loss):
    """:func:`distillation` of the logits.

    Args:
        temperature: Softmax temperature T, 1e-6 to 100. Higher values increase the weight of
            low-probability classes.
        standardize: Whether to compare :func:`standardized` logits; the authors use T = 2,
            weight 9, and weight 0.1 for the cross-entropy.

    Raises:
        ValueError: If the temperature is out of range.

    References:
        Distilling the Knowledge in a Neural Network (Hinton et al., 2014)
        https://arxiv.org/abs/1503.02531
        Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024)
        https://arxiv.org/abs/2403.01427

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> student, teacher = Features(2 * logits, logits), Features(logits, logits)
        >>> loss = KD(temperature=2.0, standardize=True)
        >>> loss(student, teacher, batch=None).item() < 1e-6  # invariant to scale
        True
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


def transformed_teacher_matching(
    student: Tensor, teacher: Tensor, *, exponent: float = 0.1, weighted: bool = False
) -> Tensor:
    r"""Compares the student's unsoftened prediction with the teacher's softened prediction.

    .. math:: \frac{1}{n} \sum_i u_i\, \mathrm{KL}\big(q_i \,\|\, p^s_i\big),
        \qquad q_i = \frac{(p^t_i)^\kappa}{\sum_j (p^t_{ij})^\kappa}

    with :math:`u_i = 1`, or weighted :math:`u_i = \sum_j (p^t_{ij})^\kappa`, which increases the
    weight of images on which the teacher is less confident. All p are softmax at temperature 1.

    Args:
        student: Logits, (n, classes).
        teacher: Logits, (n, classes).
        exponent: :math:`\kappa`, the inverse temperature of the teacher, 1e-6 to 1e6.
        weighted: Whether to weight images by :math:`u_i`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are not floating-point, or an option is out
            of range.

    References:
        Knowledge Distillation Based on Transformed Teacher Matching (Zheng & Yang, ICLR 2024)
        https://arxiv.org/abs/2402.11148

    Examples:
        >>> import torch
        >>> teacher = torch.tensor([[0.0, 10.0, 20.0]])
        >>> transformed_teacher_matching(teacher / 10, teacher).item() < 1e-6  # exponent 0.1
        True
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    in_range("exponent", exponent)
    log_power = exponent * teacher.log_softmax(1)
    log_weight = log_power.logsumexp(1, keepdim=True)
    log_s, log_q = student.log_softmax(1), log_power - log_weight
    divergence = F.kl_div(log_s, log_q, reduction="none", log_target=True).sum(1)
    return (log_weight[:, 0].exp() * divergence if weighted else divergence).mean()


class TTM(Loss):
    """:func:`transformed_teacher_matching` of the logits, TTM.

    The authors use weight 45 for vgg13 to vgg8. The loss is not multiplied by T².

    Args:
        exponent: Inverse temperature of the teacher, 1e-6 to 1e6.

    Raises:
        ValueError: If the exponent is out of range.

    References:
        Knowledge Distillation Based on Transformed Teacher Matching (Zheng & Yang, ICLR 2024)
        https://arxiv.org/abs/2402.11148

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> student, teacher = Features(logits, logits), Features(4 * logits, logits)
        >>> TTM(exponent=0.25)(student, teacher, batch=None).item() < 1e-6
        True
    """

    info = LossInfo(
        name="ttm",
        group="logits",
        compares="the student's prediction with the teacher's softened one",
        paper="Zheng & Yang, ICLR 2024",
        url="https://arxiv.org/abs/2402.11148",
        cost="n c",
        zero=False,
    )

    weighted = False

    def __init__(self, *, exponent: float = 0.1) -> None:
        super().__init__()
        self.exponent = in_range("exponent", exponent)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return transformed_teacher_matching(
            student.logits, teacher.logits, exponent=self.exponent, weighted=self.weighted
        )


class WTTM(TTM):
    """:func:`transformed_teacher_matching` with weighted images, WTTM.

    The authors use weight 4, and weight 0.8 for CRD.

    Args:
        exponent: Inverse temperature of the teacher, 1e-6 to 1e6.

    Raises:
        ValueError: If the exponent is out of range.

    References:
        Knowledge Distillation Based on Transformed Teacher Matching (Zheng & Yang, ICLR 2024)
        https://arxiv.org/abs/2402.11148

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> student, teacher = Features(logits, logits), Features(5 * logits, logits)
        >>> WTTM()(student, teacher, batch=None).item() < 1e-6
        True
    """

    info = LossInfo(
        name="wttm",
        group="logits",
        compares="the student's prediction with the teacher's softened one, weighted by doubt",
        paper="Zheng & Yang, ICLR 2024",
        url="https://arxiv.org/abs/2402.11148",
        cost="n c",
        zero=False,
    )

    weighted = True

    def __init__(self, *, exponent: float = 0.2) -> None:
        super().__init__(exponent=exponent)
