"""Distillation at a learned temperature that is trained against the student."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._validation import (
    count,
    not_negative,
    one_of,
    positive,
    refuse_unused,
    temperature,
)
from topkd.losses.base import Loss, LossInfo
from topkd.losses.dkd import decoupled_distillation
from topkd.losses.logits import distillation, standardized
from topkd.topology.gradient import scaled_gradient

Of = Literal["kd", "dkd"]


def reversal_factor(epoch: int, rise: int = 10) -> float:
    r"""Computes the factor by which the gradient of the temperature is multiplied.

    .. math:: \lambda_e = -\tfrac{1}{2} \big(1 - \cos(\pi \min(e, r) / r)\big)

    Args:
        epoch: e, counted from 1.
        rise: r, the number of epochs until the gradient is fully reversed.

    Returns:
        The factor, between -1 and 0.

    Examples:
        >>> [round(reversal_factor(epoch), 3) for epoch in (0, 5, 10, 200)]
        [-0.0, -0.5, -1.0, -1.0]
    """
    return -(1 - math.cos(math.pi * min(epoch, rise) / rise)) / 2


class CTKD(Loss):
    r"""Distillation at one learned temperature, trained adversarially, CTKD.

    .. math:: T = T_0 + s\, \sigma(\theta)

    where :math:`\theta`, initialized to 1, is trained by the student's optimizer. Its gradient is
    multiplied by :func:`reversal_factor`, so it ascends the loss that the student descends; in eval
    mode the gradient is not changed. The instance-wise temperature of the paper, predicted by a
    small network, is not implemented.

    Args:
        of: Loss computed at this temperature: :func:`~topkd.losses.logits.distillation` ("kd")
            or :func:`~topkd.losses.dkd.decoupled_distillation` ("dkd").
        lowest: Lower bound :math:`T_0` of the temperature, at least 1e-6.
        spread: Range s of the temperature; :math:`T_0 + s` is at most 100.
        rise: Epochs until the gradient is fully reversed.
        alpha: Weight of the target-class term of dkd. Defaults to 1.
        beta: Weight of the non-target-class term of dkd. Defaults to 2.
        standardize: Whether to compare :func:`~topkd.losses.logits.standardized` logits; Sun et al.
            use weight 9 for kd.

    Raises:
        ValueError: If an option is out of range, or ``alpha`` or ``beta`` is given for kd.

    References:
        Curriculum Temperature for Knowledge Distillation (Li et al., AAAI 2023)
        https://arxiv.org/abs/2211.16231
        Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024)
        https://arxiv.org/abs/2403.01427

    Examples:
        >>> round(CTKD().temperature.item(), 2)
        15.62
    """

    info = LossInfo(
        name="ctkd",
        group="logits",
        compares="predictions, softened at an adversarial temperature",
        paper="Li et al., AAAI 2023",
        url="https://arxiv.org/abs/2211.16231",
        cost="n c, one learned temperature",
    )

    def __init__(
        self,
        *,
        of: Of = "kd",
        lowest: float = 1.0,
        spread: float = 20.0,
        rise: int = 10,
        alpha: float | None = None,
        beta: float | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.of = one_of("of", of, Of)
        if of == "kd":
            given = {"alpha": alpha, "beta": beta}
            refuse_unused({k: v for k, v in given.items() if v is not None}, given, "of: kd")
        self.rise = count("rise", rise)
        self.lowest, self.spread = temperature(lowest, "lowest"), positive("spread", spread)
        temperature(lowest + spread, "lowest + spread")
        self.alpha = not_negative("alpha", 1.0 if alpha is None else alpha)
        self.beta = not_negative("beta", 2.0 if beta is None else beta)
        self.standardize = standardize
        self.theta = nn.Parameter(torch.ones(()))
        self.factor = 0.0

    def on_epoch_start(self, epoch: int) -> None:
        """Updates the factor of the temperature's gradient."""
        self.factor = reversal_factor(epoch, self.rise)

    @property
    def temperature(self) -> Tensor:
        """The current temperature T, a scalar with gradient."""
        theta = scaled_gradient(self.theta, self.factor) if self.training else self.theta
        return self.lowest + self.spread * theta.sigmoid()

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        logits, temperature = (student.logits, teacher.logits), self.temperature
        s, t = map(standardized, logits) if self.standardize else logits
        if self.of == "kd":
            return distillation(s, t, temperature=temperature)
        return decoupled_distillation(
            s, t, batch.target, alpha=self.alpha, beta=self.beta, temperature=temperature
        )
