"""Losses on logits."""

import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import (
    LOGITS,
    check_floats,
    check_shapes,
)
from topkd.losses._validation import temperature as checked
from topkd.losses.base import Loss, LossInfo

MIN_STD = 0.1  # of logits; trained networks exceed it


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
