"""Losses that guess what the teacher computed from what the student did."""

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

FLOOR = 1e-5  # of the variances of VID


def regressor(student: Sequence[int], teacher: Sequence[int], *, relu: bool) -> nn.Sequential:
    """Builds what takes maps of one shape to another: one convolution and a normalization.

    The convolution is 3x3 with stride 2 to halve the size, 4x4 transposed with stride 2 to double
    it, and else as large as takes a larger map to a smaller one without padding.

    Args:
        student: Channels, height and width of what goes in.
        teacher: Channels, height and width of what comes out.
        relu: Whether a ReLU ends it.

    Raises:
        ValueError: If what comes out is larger than what goes in, but not twice as large.

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
            f"no regressor takes maps of {size_in[0]}x{size_in[1]} to {size[0]}x{size[1]}: the "
            "student's may be larger, equal or half as large; let the term's taps choose others"
        )
    rest = [nn.BatchNorm2d(channels), *([nn.ReLU()] if relu else [])]
    return nn.Sequential(convolution, *rest)


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Computes the mean squared difference of two features of the same shape.

    .. math:: \frac{1}{m} \lVert F^s - F^t \rVert^2

    Args:
        student: A feature of m numbers in all, of any shape.
        teacher: Its aim.

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
    """Guesses one map of the teacher from the student's: :func:`mean_square` behind a regressor.

    The regressor is a convolution with a normalization and a ReLU, as in RepDistiller, and learns
    with the student from the first epoch on. (The paper trains the lower half of the student so
    before anything else: give the term a ``stop`` and the others a ``start`` for that.)

    Args:
        stage: Which map, 0 that of the stem; negative numbers count from the deep end.
        relu: Whether the output of the regressor is rectified. It should not be where the teacher's
            map has negative numbers, as those of wide ResNets and of MobileNetV2 have.

    References:
        FitNets: Hints for Thin Deep Nets (Romero et al., ICLR 2015)
        https://arxiv.org/abs/1412.6550
    """

    info = LossInfo(
        name="fitnet",
        group="feature maps",
        compares="one feature map, guessed from the student's",
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
            ValueError: If the networks differ in the number of maps, there is no such map, or
                the teacher's is larger than the student's but not twice as large.
        """
        pairs = paired(student.maps, teacher.maps)
        if not -len(pairs) <= self.stage < len(pairs):
            raise ValueError(
                f"there is no map {self.stage}: of {len(pairs)} maps the last is "
                f"{len(pairs) - 1}, or -1"
            )
        shape, aim = (m.shape[1:] for m in pairs[self.stage])
        self.regress = regressor(shape, aim, relu=self.relu)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return mean_square(self.regress(student.maps[self.stage]), teacher.maps[self.stage])


class MSE(Loss):
    """:func:`mean_square` of the embeddings, the student's behind a linear map if widths differ.

    References:
        Distilling Knowledge by Mimicking Features (Wang et al., TPAMI 2021), its squared error
        https://arxiv.org/abs/2011.01424
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
        """Creates the linear map, where the widths differ."""
        own, wanted = student.embedding.shape[1], teacher.embedding.shape[1]
        self.project = nn.Identity() if own == wanted else nn.Linear(own, wanted)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return mean_square(self.project(student.embedding), teacher.embedding)


def gaussian_nll(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    r"""Computes how unlikely a teacher's map is to a guess of it with known uncertainty.

    .. math:: \frac{1}{2m} \sum \Big[ \frac{(F^t - \mu)^2}{\sigma^2} + \log \sigma^2 \Big]

    over all m numbers of the map: the negative logarithm of a Gaussian density, without its
    constant.

    Args:
        mean: The guess :math:`\mu`, (n, c, h, w).
        variance: :math:`\sigma^2` of each channel, (c,).
        teacher: The map :math:`F^t`, (n, c, h, w).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If guess and map differ in shape, or a variance is missing or not positive.

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
    errors = (mean - teacher).square().mean((0, 2, 3))  # of each channel
    return 0.5 * (errors / variance + variance.log()).mean()


class VID(Loss):
    r"""The sum over stages of the :func:`gaussian_nll` at the teacher's maps.

    Three 1x1 convolutions guess each map from the student's; the larger of the two is averaged to
    the size of the smaller first. The variance of a channel is :math:`\mathrm{softplus}(\rho) +
    10^{-5}` and is learned with the rest, as in RepDistiller; mdistiller does not train it. Weight
    decay also acts on :math:`\rho`.

    Args:
        skip: How many maps are left out at the shallow end; the first is that of the stem.
        variance: At the start.

    References:
        Variational Information Distillation for Knowledge Transfer (Ahn et al., CVPR 2019)
        https://arxiv.org/abs/1904.05835
    """

    info = LossInfo(
        name="vid",
        group="feature maps",
        compares="feature maps, guessed with learned uncertainty",
        paper="Ahn et al., CVPR 2019",
        url="https://arxiv.org/abs/1904.05835",
        cost="n d k with k channels, three 1x1 convolutions a stage",
        zero=False,
    )

    reads_maps = True

    def __init__(self, *, skip: int = 1, variance: float = 5.0) -> None:
        super().__init__()
        if not FLOOR < variance < math.inf:
            raise ValueError(f"variance must be above {FLOOR}, got {variance}")
        self.skip, self.variance = skipped(skip), variance

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates the regressors and the variances.

        Raises:
            ValueError: If the networks differ in the number of maps.
        """
        pairs = paired(student.maps, teacher.maps, self.skip)
        channels = [(s.shape[1], t.shape[1]) for s, t in pairs]
        self.guesses = nn.ModuleList(_guess(c_s, c_t) for c_s, c_t in channels)
        surplus = self.variance - FLOOR
        start = surplus + math.log(-math.expm1(-surplus))  # of softplus, inverted
        self.rho = nn.ParameterList(torch.full((c_t,), start) for _, c_t in channels)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = paired(student.maps, teacher.maps, self.skip)
        values = []
        for (s, t), guess, rho in zip(pairs, self.guesses, self.rho, strict=True):
            seen, aim = to_smaller(s, t)
            values.append(gaussian_nll(guess(seen), F.softplus(rho) + FLOOR, aim))
        return torch.stack(values).sum()


def _guess(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
    )
