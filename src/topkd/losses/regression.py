"""Feature-regression losses with learned adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._validation import MAPS, check_shapes, positive, skipped
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import paired, to_smaller

MIN_VARIANCE = 1e-5  # of VID


def regressor(student: Sequence[int], teacher: Sequence[int], *, relu: bool) -> nn.Sequential:
    """Builds an adapter between map shapes: one convolution and a batch normalization.

    The convolution is 3x3 with stride 2 to halve the size, 4x4 transposed with stride 2 to double
    it. For other sizes, it has no padding and the kernel size that yields the smaller size.

    Args:
        student: Channels, height and width of the input.
        teacher: Channels, height and width of the output.
        relu: Whether to append a ReLU.

    Returns:
        The adapter, a sequential module.

    Raises:
        ValueError: If the output is larger than the input, but not twice as large.

    Examples:
        >>> regressor((16, 8, 8), (64, 4, 4), relu=True)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 64, 4, 4])
    """
    channels_in, *size_in = student
    channels, *size = teacher
    convolution: nn.Module
    if all(a == 2 * b for a, b in zip(size_in, size, strict=True)):
        convolution = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1)
    elif all(2 * a == b for a, b in zip(size_in, size, strict=True)):
        convolution = nn.ConvTranspose2d(channels_in, channels, 4, stride=2, padding=1)
    elif all(a >= b for a, b in zip(size_in, size, strict=True)):
        height, width = (1 + a - b for a, b in zip(size_in, size, strict=True))
        convolution = nn.Conv2d(channels_in, channels, (height, width))
    else:
        raise ValueError(
            f"no regressor maps {size_in[0]}x{size_in[1]} to {size[0]}x{size[1]}: the "
            "student's may be larger, equal or half as large; select others with the term's taps"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), *([nn.ReLU()] if relu else []))


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Computes the mean squared difference of two features of the same shape.

    .. math:: \frac{1}{m} \lVert F^s - F^t \rVert^2

    Args:
        student: A feature with m entries in total, of any shape.
        teacher: The target, of the same shape.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the features differ in shape.

    References:
        FitNets: Hints for Thin Deep Nets (Romero et al., ICLR 2015)
        https://arxiv.org/abs/1412.6550

    Examples:
        >>> mean_square(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    check_shapes("features", student, teacher)
    return F.mse_loss(student, teacher)


class FitNet(Loss):
    """Regresses one teacher map from the student's: :func:`mean_square` after a regressor.

    The regressor is a convolution with a batch normalization and a ReLU, as in RepDistiller. It is
    trained together with the student from the first epoch. (The paper pre-trains the lower half of
    the student this way; for that, give the term a ``stop`` and the other terms a ``start``.)

    Args:
        stage: Index of the map; 0 is that of the stem, negative indices count from the deep end.
        relu: Whether the regressor ends with a ReLU. Disable it if the teacher's map has negative
            values, as in wide ResNets and MobileNetV2.

    References:
        FitNets: Hints for Thin Deep Nets (Romero et al., ICLR 2015)
        https://arxiv.org/abs/1412.6550

    Examples:
        >>> logits, embedding = torch.zeros(2, 10), torch.zeros(2, 8)
        >>> student = Features(logits, embedding, [torch.rand(2, 4, 8, 8)])
        >>> teacher = Features(logits, embedding, [torch.rand(2, 16, 4, 4)])
        >>> loss = FitNet(stage=-1)
        >>> loss.setup(student, teacher, context=None)
        >>> loss(student, teacher, batch=None).shape
        torch.Size([])
    """

    info = LossInfo(
        name="fitnet",
        group="feature maps",
        compares="one feature map, regressed from the student's",
        paper="Romero et al., ICLR 2015",
        url="https://arxiv.org/abs/1412.6550",
        cost="n d c, one convolution",
        zero=False,
    )

    reads_maps = True

    def __init__(self, *, stage: int = 2, relu: bool = True) -> None:
        super().__init__()
        self.stage, self.relu = stage, relu

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates the regressor.

        Raises:
            ValueError: If the networks differ in the number of maps, the stage does not exist, or
                the teacher's map is larger than the student's but not twice as large.
        """
        pairs = paired(student.maps, teacher.maps)
        if not -len(pairs) <= self.stage < len(pairs):
            raise ValueError(
                f"there is no map {self.stage}: of {len(pairs)} maps the last is "
                f"{len(pairs) - 1}, or -1"
            )
        shape, target = (m.shape[1:] for m in pairs[self.stage])
        self.regress = regressor(shape, target, relu=self.relu)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return mean_square(self.regress(student.maps[self.stage]), teacher.maps[self.stage])


class MSE(Loss):
    """:func:`mean_square` of the embeddings, after a linear layer if the widths differ.

    References:
        Distilling Knowledge by Mimicking Features (Wang et al., TPAMI 2021), its squared error
        https://arxiv.org/abs/2011.01424

    Examples:
        >>> student = Features(torch.zeros(2, 10), torch.rand(2, 8))
        >>> teacher = Features(torch.zeros(2, 10), torch.rand(2, 32))
        >>> loss = MSE()
        >>> loss.setup(student, teacher, context=None)
        >>> loss.project
        Linear(in_features=8, out_features=32, bias=True)
    """

    info = LossInfo(
        name="mse",
        group="feature maps",
        compares="embeddings",
        paper="Wang et al., TPAMI 2021",
        url="https://arxiv.org/abs/2011.01424",
        cost="n d, one projection where widths differ",
    )

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates a linear layer if the widths differ."""
        width, target_width = student.embedding.shape[1], teacher.embedding.shape[1]
        self.project = nn.Identity() if width == target_width else nn.Linear(width, target_width)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return mean_square(self.project(student.embedding), teacher.embedding)


def gaussian_nll(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    r"""Computes the Gaussian negative log-likelihood of a teacher map, given a predicted mean.

    .. math:: \frac{1}{2m} \sum \Big[ \frac{(F^t - \mu)^2}{\sigma^2} + \log \sigma^2 \Big]

    over the m entries of the map, without the additive constant.

    Args:
        mean: Predicted mean :math:`\mu`, (n, c, h, w).
        variance: Variance :math:`\sigma^2` of each channel, (c,).
        teacher: The map :math:`F^t`, (n, c, h, w).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If mean and map differ in shape, or the variances are not (c,) and positive.

    References:
        Variational Information Distillation for Knowledge Transfer (Ahn et al., CVPR 2019)
        https://arxiv.org/abs/1904.05835

    Examples:
        >>> maps = torch.zeros(1, 1, 2, 2)
        >>> gaussian_nll(maps + 3, torch.tensor([1.0]), maps).item()
        4.5
    """
    check_shapes("maps", mean, teacher, form=MAPS)
    if variance.shape != mean.shape[1:2]:
        raise ValueError(
            f"the variance must be of each channel, ({mean.shape[1]},), got {tuple(variance.shape)}"
        )
    positive("the least variance", variance.detach().min())
    errors = (mean - teacher).square().mean((0, 2, 3))  # per channel
    return 0.5 * (errors / variance + variance.log()).mean()


class VID(Loss):
    r"""The sum over stages of the :func:`gaussian_nll` of the teacher's maps, VID.

    Three 1x1 convolutions predict each map from the student's; the larger of the two maps is
    average-pooled to the size of the smaller first. The variance of a channel is
    :math:`\mathrm{softplus}(\rho) + 10^{-5}` and is trained as in RepDistiller; mdistiller does not
    train it. Weight decay also acts on :math:`\rho`.

    Args:
        skip: Number of maps skipped at the shallow end; the first map is that of the stem.
        variance: Initial variance.

    Raises:
        ValueError: If ``skip`` is negative, or ``variance`` is not above 1e-5.

    References:
        Variational Information Distillation for Knowledge Transfer (Ahn et al., CVPR 2019)
        https://arxiv.org/abs/1904.05835

    Examples:
        >>> logits, embedding = torch.zeros(2, 10), torch.zeros(2, 8)
        >>> student = Features(logits, embedding, [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)])
        >>> teacher = Features(logits, embedding, [torch.rand(2, 4, 8, 8), torch.rand(2, 32, 4, 4)])
        >>> loss = VID(variance=1.0)
        >>> loss.setup(student, teacher, context=None)
        >>> [rho.shape for rho in loss.rho]  # the stem is skipped
        [torch.Size([32])]
    """

    info = LossInfo(
        name="vid",
        group="feature maps",
        compares="feature maps, predicted with a learned variance",
        paper="Ahn et al., CVPR 2019",
        url="https://arxiv.org/abs/1904.05835",
        cost="n d k with k channels, three 1x1 convolutions a stage",
        zero=False,
    )

    reads_maps = True

    def __init__(self, *, skip: int = 1, variance: float = 5.0) -> None:
        super().__init__()
        if not MIN_VARIANCE < variance < math.inf:
            raise ValueError(f"variance must be above {MIN_VARIANCE}, got {variance}")
        self.skip, self.variance = skipped(skip), variance

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates the regressors and the variances.

        Raises:
            ValueError: If the networks differ in the number of maps.
        """
        pairs = paired(student.maps, teacher.maps, self.skip)
        channels = [(s.shape[1], t.shape[1]) for s, t in pairs]
        self.regressors = nn.ModuleList(_mean_regressor(c_s, c_t) for c_s, c_t in channels)
        surplus = self.variance - MIN_VARIANCE
        start = surplus + math.log(-math.expm1(-surplus))  # inverse of softplus
        self.rho = nn.ParameterList(torch.full((c_t,), start) for _, c_t in channels)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = paired(student.maps, teacher.maps, self.skip)
        values = []
        for (s, t), regress, rho in zip(pairs, self.regressors, self.rho, strict=True):
            pooled, target = to_smaller(s, t)
            values.append(gaussian_nll(regress(pooled), F.softplus(rho) + MIN_VARIANCE, target))
        return torch.stack(values).sum()


def _mean_regressor(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
    )
