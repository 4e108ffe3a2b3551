"""Losses on the logits."""

import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses.base import Loss


class CrossEntropy(Loss):
    """Cross-entropy of the student's logits with the labels; needs no teacher.

    Args:
        label_smoothing: Share of the target that is spread over all classes.

    References:
        Rethinking the Inception Architecture (Szegedy et al., CVPR 2016), for the smoothing
        https://arxiv.org/abs/1512.00567
    """

    needs_teacher = False

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return F.cross_entropy(student.logits, batch.target, label_smoothing=self.label_smoothing)


def distillation(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
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
        ValueError: If the logits differ in shape.

    References:
        Distilling the Knowledge in a Neural Network (Hinton et al., 2014)
        https://arxiv.org/abs/1503.02531

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> distillation(logits + 5, logits).abs().item() < 1e-6  # it sees only differences
        True
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )
    log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class Distillation(Loss):
    """:func:`distillation` of the logits.

    Args:
        temperature: T; the greater, the more the unlikely classes count.

    References:
        Distilling the Knowledge in a Neural Network (Hinton et al., 2014)
        https://arxiv.org/abs/1503.02531
    """

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return distillation(student.logits, teacher.logits, temperature=self.temperature)
