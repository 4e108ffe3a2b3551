"""A loss on what passes a ReLU, and on nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from topkd.features import INPUT, Batch, Features, Teacher
from topkd.losses._validation import check_shapes, skipped
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import depth_weighted_sum, paired, to_smaller

RARE = 0.001  # a channel that is negative less often has no mean of its negative responses
MEASURED_ON = 16  # batches, where no normalization tells


def negative_mean(mean: Tensor, std: Tensor) -> Tensor:
    r"""Computes the mean of the negative part of Gaussians.

    .. math:: \mathrm{E}[x \mid x < 0] = \mu - \sigma \frac{\varphi(\mu / \sigma)}
        {\Phi(-\mu / \sigma)}

    A Gaussian that is negative with a probability of 0.001 or less has :math:`-3 \sigma` instead.

    Args:
        mean: :math:`\mu`, of any shape.
        std: :math:`\sigma`, of the same; 0 is taken for the limit.

    Returns:
        The means, of the same shape, none of them positive.

    References:
        A Comprehensive Overhaul of Feature Distillation (Heo et al., ICCV 2019)
        https://arxiv.org/abs/1904.01866

    Examples:
        >>> negative_mean(torch.tensor([0.0]), torch.tensor([1.0]))  # -sqrt(2 / pi)
        tensor([-0.7979])
    """
    std = std.clamp(min=torch.finfo(std.dtype).tiny)
    steps = mean / std
    log_below = torch.special.log_ndtr(-steps)
    log_density = -0.5 * steps.square() - 0.5 * math.log(2 * math.pi)
    tail = mean - std * (log_density - log_below).exp()
    return torch.where(log_below > math.log(RARE), tail, -3 * std)


def partial_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], margins: Sequence[Tensor]
) -> Tensor:
    r"""Compares pre-activations as far as they matter behind the ReLU.

    .. math:: \frac{1}{n} \sum_{l=1}^{L} 2^{l-L} \sum (s - t')^2 \, [s > t' \text{ or } t > 0],
        \qquad t' = \max(t, m)

    over all neurons of the n images: where the teacher's response is negative, the student's only
    has to be below the margin m of the channel.

    Args:
        student: Pre-activations s of L stages, shallow to deep, (n, c, h, w) each.
        teacher: Those of the teacher, t, of the same shapes.
        margins: m of every channel, (c,) for each stage.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the pre-activations differ in number or in shape.

    References:
        A Comprehensive Overhaul of Feature Distillation (Heo et al., ICCV 2019)
        https://arxiv.org/abs/1904.01866

    Examples:
        >>> aim = torch.tensor([-4.0, 2.0]).view(1, 2, 1, 1)
        >>> seen = torch.tensor([-9.0, 3.0]).view(1, 2, 1, 1)
        >>> partial_distance([seen], [aim], [torch.tensor([-1.0, -1.0])]).item()  # -9 is below -1
        1.0
    """
    values = []
    pairs = paired(student, teacher, kind="pre-activations")
    if [tuple(m.shape) for m in margins] != [(t.shape[1],) for _, t in pairs]:
        raise ValueError(
            f"margins must be of each channel, {[(t.shape[1],) for _, t in pairs]}, "
            f"got {[tuple(m.shape) for m in margins]}"
        )
    for (s, t), margin in zip(pairs, margins, strict=True):
        check_shapes("pre-activations", s, t)
        gap = s - torch.maximum(t, margin[:, None, None])
        active = ((gap > 0) | (t > 0)).to(
            gap.dtype
        )  # numbers: to multiply by booleans takes longer
        values.append(gap.mul_(active).square().sum() / len(s))
    return depth_weighted_sum(values)


class OFD(Loss):
    """:func:`partial_distance` of all stages.

    The student's pre-activations pass a 1x1 convolution and a normalization. Where sizes differ,
    the larger pre-activation is averaged to the size of the smaller. Margins are read off the
    normalization before each ReLU of the teacher, as Gaussians with its shift and scale; where none
    is found, they are the measured means of what is negative. As it is a sum over neurons, it wants
    a small weight: the authors' is 0.001, and 0.0001 for ImageNet.

    The authors and mdistiller run the teacher with the statistics of each batch; here it is in eval
    mode, as for all losses.

    Args:
        skip: How many pre-activations are left out at the shallow end; the first are those of the
            stem.

    References:
        A Comprehensive Overhaul of Feature Distillation (Heo et al., ICCV 2019)
        https://arxiv.org/abs/1904.01866
    """

    info = LossInfo(
        name="ofd",
        group="feature maps",
        compares="pre-activations that pass the ReLU",
        paper="Heo et al., ICCV 2019",
        url="https://arxiv.org/abs/1904.01866",
        cost="n d k with k channels, one 1x1 convolution a stage",
        zero=False,
    )

    reads_maps = True

    def __init__(self, *, skip: int = 1) -> None:
        super().__init__()
        self.skip = skipped(skip)
        self.sources: list[str] = []

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates the connectors and reads the margins off the teacher.

        Raises:
            ValueError: If the networks differ in the number of pre-activations.
        """
        pairs = paired(student.preactivations, teacher.preactivations, self.skip, "pre-activations")
        found = find_margins([t for _, t in pairs], context, self.skip)
        self.sources = [source for _, source in found]
        self.connectors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False), nn.BatchNorm2d(t.shape[1])
            )
            for s, t in pairs
        )
        for number, (margin, _) in enumerate(found):
            self.register_buffer(f"margin{number}", margin)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = paired(student.preactivations, teacher.preactivations, self.skip, "pre-activations")
        moved, aims = [], []
        for connect, (s, t) in zip(self.connectors, pairs, strict=True):
            seen, aim = to_smaller(connect(s), t)
            moved.append(seen)
            aims.append(aim)
        margins = [self.get_buffer(f"margin{number}") for number in range(len(pairs))]
        return partial_distance(moved, aims, margins)

    def metadata(self) -> dict[str, Any]:
        """Returns where the margins are from."""
        return {"margins": self.sources}


def find_margins(
    preactivations: Sequence[Tensor], context: LossContext, skip: int
) -> list[tuple[Tensor, str]]:
    """Finds the margins of a teacher's channels.

    Args:
        preactivations: Those that are compared, (n, c, h, w) each, shallow to deep.
        context: The teacher, and its answers to the training images.
        skip: How many are left out before them.

    Returns:
        For each, (c,) and where it is from.
    """
    before: list[tuple[str, nn.BatchNorm2d] | None] = [None] * len(preactivations)
    if context.teacher is not None:
        shown, _ = next(iter(context.teacher_batches(0)))
        taps = context.taps.teacher.preactivations or context.teacher.network.preactivations
        before = normalizations(context.teacher, shown.images[:2], taps)[skip:]
    measured: list[Tensor] = []
    found = []
    for place, preactivation in enumerate(preactivations):
        named = before[place]
        if named is not None and named[1].num_features == preactivation.shape[1]:
            found.append((_margin_of(named[1]), named[0]))
            continue
        measured = measured or _measure(context)
        found.append((measured[skip + place], f"measured on {MEASURED_ON} batches"))
    return found


def normalizations(
    teacher: Teacher, images: Tensor, taps: Sequence[str]
) -> list[tuple[str, nn.BatchNorm2d] | None]:
    """Finds the normalization before each pre-activation of a network.

    That is the last one to be computed before the tap reads, of all whose output has the shape of
    what is read.

    Args:
        teacher: The network.
        images: Any, as it is usually shown them, (n, 3, h, w).
        taps: Of the pre-activations.

    Returns:
        For each tap, the name and the module, or None if there is none.
    """
    network = teacher.network.network
    modules = dict(network.named_modules())
    weight = next(network.parameters())
    seen: list[tuple[str, nn.BatchNorm2d, torch.Size]] = []
    found: dict[str, tuple[str, nn.BatchNorm2d] | None] = {}

    def after_normalization(module: nn.BatchNorm2d, name: str, output: Tensor) -> None:
        seen.append((name, module, output.shape))

    def at_tap(tap: str, read: Tensor) -> None:
        fitting = [(name, module) for name, module, shape in seen if shape == read.shape]
        found[tap] = fitting[-1] if fitting else None

    hooks = [
        module.register_forward_hook(
            lambda module, _, output, name=name: after_normalization(module, name, output)
        )
        for name, module in modules.items()
        if isinstance(module, nn.BatchNorm2d)
    ]
    for tap in taps:
        module = modules[tap.removesuffix(INPUT)]
        hooks.append(
            module.register_forward_pre_hook(lambda _, args, tap=tap: at_tap(tap, args[0]))
            if tap.endswith(INPUT)
            else module.register_forward_hook(lambda _, args, out, tap=tap: at_tap(tap, out))
        )
    try:
        teacher(images.to(weight))
    finally:
        for hook in hooks:
            hook.remove()
    return [found.get(tap) for tap in taps]


def _margin_of(normalization: nn.BatchNorm2d) -> Tensor:
    zeros = torch.zeros(normalization.num_features)
    if not normalization.affine:
        return negative_mean(zeros, zeros + 1)
    mean, std = normalization.bias.detach(), normalization.weight.detach().abs()
    return negative_mean(mean, std)


def _measure(context: LossContext) -> list[Tensor]:
    """Averages the negative responses of every channel, 0 where there is none."""
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for _, answer in islice(context.teacher_batches(0), MEASURED_ON):
        for place, t in enumerate(answer.preactivations):
            total, count = t.clamp(max=0).sum((0, 2, 3)), (t < 0).sum((0, 2, 3))
            if place == len(sums):
                sums.append(torch.zeros_like(total))
                counts.append(torch.zeros_like(count))
            sums[place] += total
            counts[place] += count
    return [total / count.clamp(min=1) for total, count in zip(sums, counts, strict=True)]
