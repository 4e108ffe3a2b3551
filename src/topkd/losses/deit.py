"""Losses on a head of its own that learns from the teacher."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import LOGITS, check_shapes, one_of
from topkd.losses._validation import temperature as checked
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.logits import distillation

Kind = Literal["hard", "soft"]


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Teaches the class that the teacher names, as if it were the label.

    .. math:: -\frac{1}{n} \sum_i \log p^s_{i \hat y_i}, \qquad \hat y_i = \arg\max_j z^t_{ij}

    Args:
        student: Logits, (n, classes).
        teacher: Logits :math:`z^t`, (n, classes).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the logits differ in shape or are no floats, or an option is out of range.

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
    """Distils the teacher into the logits of the distillation token, as DeiT does.

    Hard, it is :func:`hard_distillation`; soft, :func:`~topkd.losses.logits.distillation`. The
    class token has cross-entropy for its own; published is 0.5 of each.

    The soft loss is followed as in timm, a mean over images. DeiT's own code divides by the
    number of classes as well, which ``legacy`` gives.

    Args:
        kind: Whether the teacher's class or its whole prediction is taught.
        temperature: Of the soft loss.
        legacy: Whether to divide the soft loss by the number of classes.

    Raises:
        ValueError: If the student has no distillation token.

    References:
        Training data-efficient image transformers (Touvron et al., ICML 2021)
        https://arxiv.org/abs/2012.12877
    """

    info = LossInfo(
        name="deit",
        group="logits",
        compares="the logits of the distillation token with the predicted class",
        paper="Touvron et al., ICML 2021",
        url="https://arxiv.org/abs/2012.12877",
        cost="n c, a student with a distillation token",
        zero=False,
    )

    def __init__(
        self, *, kind: Kind = "hard", temperature: float = 1.0, legacy: bool = False
    ) -> None:
        super().__init__()
        self.kind, self.legacy = one_of("kind", kind, Kind), legacy
        if kind == "hard" and (temperature != 1 or legacy):
            raise ValueError("temperature and legacy are options of the kind soft")
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
            "that has one, or the loss kd"
        )
    return student.distilled
