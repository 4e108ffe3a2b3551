"""The student's prediction with the teacher's softened one, TTM and WTTM."""

import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import (
    LOGITS,
    check_shapes,
)
from topkd.losses._validation import exponent as in_range
from topkd.losses.base import Loss, LossInfo


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
