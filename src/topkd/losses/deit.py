"""Losses on the logits of a distillation head."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import LOGITS, check_shapes, one_of, refuse_unused
from topkd.losses._validation import temperature as checked
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.logits import distillation

Kind = Literal["hard", "soft"]


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Cross-entropy of the student with the class that the teacher predicts.

    .. math:: -\frac{1}{n} \sum_i \log p^s_{i \hat y_i}, \qquad \hat y_i = \arg\max_j z^t_{ij}

    Args:
        student: Logits, (n, classes).
        teacher: Logits :math:`z^t`, (n, classes).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are not floating-point.

    References:
        Training data-efficient image transformers (Touvron et al., ICML 2021)
        https://arxiv.org/abs/2012.12877

    Examples:
        >>> import torch
        >>> loss = hard_distillation(torch.zeros(1, 4), torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
        >>> round(loss.exp().item(), 4)
        4.0
    """
    check_shapes("logits", student, teacher, form=LOGITS)
    return F.cross_entropy(student, teacher.argmax(1))


class DeiT(Loss):
    """Distills the teacher into the logits of the distillation token, as in DeiT.

    The hard loss is :func:`hard_distillation`, the soft loss
    :func:`~topkd.losses.logits.distillation`. The class token is trained by a separate
    cross-entropy term; the published weights are 0.5 each.

    As in timm, the soft loss is a mean over images. DeiT's code also divides it by the number of
    classes; ``legacy`` reproduces that.

    Args:
        kind: Whether to distill the teacher's predicted class ("hard") or its distribution
            ("soft").
        temperature: Softmax temperature of the soft loss, 1e-6 to 100.
        legacy: Whether to divide the soft loss by the number of classes.

    Raises:
        ValueError: If ``temperature`` or ``legacy`` is given for the hard loss, or an option is out
            of range.

    References:
        Training data-efficient image transformers (Touvron et al., ICML 2021)
        https://arxiv.org/abs/2012.12877

    Examples:
        >>> import torch
        >>> student = Features(torch.zeros(1, 4), torch.zeros(1, 8), distilled=torch.zeros(1, 4))
        >>> teacher = Features(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.zeros(1, 8))
        >>> DeiT()(student, teacher, batch=None)  # log 4
        tensor(1.3863)
    """

    info = LossInfo(
        name="deit",
        group="logits",
        compares="logits of the distillation token with the teacher's class",
        paper="Touvron et al., ICML 2021",
        url="https://arxiv.org/abs/2012.12877",
        cost="n c, a student with a distillation token",
        zero=False,
    )

    reads_distilled = True

    def __init__(
        self, *, kind: Kind = "hard", temperature: float = 1.0, legacy: bool = False
    ) -> None:
        super().__init__()
        self.kind, self.legacy = one_of("kind", kind, Kind), legacy
        if kind == "hard":
            refuse_unused(self.options, ("temperature", "legacy"), "kind: hard")
        self.temperature = checked(temperature)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Checks that the student has a distillation token.

        Raises:
            ValueError: If it has none.
        """
        _distilled(student)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        logits = _distilled(student)
        if self.kind == "hard":
            return hard_distillation(logits, teacher.logits)
        value = distillation(logits, teacher.logits, temperature=self.temperature)
        return value / logits.shape[1] if self.legacy else value


def _distilled(student: Features) -> Tensor:
    if student.distilled is None:
        raise ValueError(
            "deit needs a student with a distillation token, this one has none; choose a model "
            "with a distillation token, or the loss kd"
        )
    return student.distilled
