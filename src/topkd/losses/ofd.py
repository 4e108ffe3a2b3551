"""Overhaul of feature distillation: a loss on pre-activations, gated by the ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from topkd.features import INPUT, Batch, Features, Teacher
from topkd.losses._places import check_preactivations
from topkd.losses._validation import check_shapes, skipped
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import depth_weighted_sum, paired, to_smaller

MIN_NEGATIVE_PROBABILITY = 0.001  # below it, the mean of the negative part is ill-conditioned
MARGIN_BATCHES = 16  # batches on which margins are measured without a batch normalization


def negative_mean(mean: Tensor, std: Tensor) -> Tensor:
    r"""Computes the mean of the negative part of Gaussians.

    .. math:: \mathrm{E}[x \mid x < 0] = \mu - \sigma \frac{\varphi(\mu / \sigma)}
        {\Phi(-\mu / \sigma)}

    For a Gaussian that is negative with a probability of at most 0.001, the result is
    :math:`-3 \sigma`.

    Args:
        mean: :math:`\mu`, of any shape.
        std: :math:`\sigma`, of the same shape; 0 stands for the limit.

    Returns:
        The means, of the same shape, at most 0.

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
    return torch.where(log_below > math.log(MIN_NEGATIVE_PROBABILITY), tail, -3 * std)


def partial_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], margins: Sequence[Tensor]
) -> Tensor:
    r"""Computes the squared distance of pre-activations, gated by the ReLU.

    .. math:: \frac{1}{n} \sum_{l=1}^{L} 2^{l-L} \sum (s - t')^2 \, [s > t' \text{ or } t > 0],
        \qquad t' = \max(t, m)

    over all neurons of the n images. Where the teacher's response is negative, the student's only
    has to be below the margin m of the channel.

    Args:
        student: Pre-activations s of L stages, shallow to deep, (n, c, h, w) each.
        teacher: Pre-activations t of the teacher, of the same shapes.
        margins: Margin m of each channel, (c,) for each stage.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the pre-activations differ in number or in shape, or the margins are not
            (c,).

    References:
        A Comprehensive Overhaul of Feature Distillation (Heo et al., ICCV 2019)
        https://arxiv.org/abs/1904.01866

    Examples:
        >>> teacher = torch.tensor([-4.0, 2.0]).view(1, 2, 1, 1)
        >>> student = torch.tensor([-9.0, 3.0]).view(1, 2, 1, 1)
        >>> margin = torch.tensor([-1.0, -1.0])
        >>> partial_distance([student], [teacher], [margin]).item()  # -9 is below the margin
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
        difference = s - torch.maximum(t, margin[:, None, None])
        # Floats: multiplication by booleans is slower.
        active = ((difference > 0) | (t > 0)).to(difference.dtype)
        values.append(difference.mul_(active).square().sum() / len(s))
    return depth_weighted_sum(values)


class OFD(Loss):
    """The :func:`partial_distance` of all stages, OFD.

    The student's pre-activations pass a 1x1 convolution and a batch normalization. Where sizes
    differ, the larger pre-activation is average-pooled to the size of the smaller. Margins are
    computed from the shift and scale of the batch normalization before each ReLU of the teacher;
    without one, they are the measured means of negative responses. The loss is a sum over neurons
    and needs a small weight: the authors use 0.001, and 0.0001 for ImageNet.

    The teacher's pre-activations must be inputs of ReLUs, which excludes teachers such as
    MobileNetV2, without a ReLU after a block. Those of the student must have negative values.

    The authors and mdistiller run the teacher with batch statistics; here it is in eval mode, as
    for all losses.

    Args:
        skip: Number of pre-activations skipped at the shallow end; the first are those of the stem.

    Raises:
        ValueError: If ``skip`` is negative.

    References:
        A Comprehensive Overhaul of Feature Distillation (Heo et al., ICCV 2019)
        https://arxiv.org/abs/1904.01866

    Examples:
        >>> from topkd import Distiller
        >>> from topkd.losses import CE
        >>> from topkd.models import create
        >>> images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
        >>> student, teacher = (create(name, classes=10) for name in ("resnet8", "wrn_16_1"))
        >>> loss = OFD()
        >>> distiller = Distiller(student, teacher, [CE(), 0.001 * loss]).setup(images)
        >>> loss.metadata()  # the stem is skipped
        {'margins': ['block2.layer.0.bn1', 'block3.layer.0.bn1', 'bn1']}
    """

    info = LossInfo(
        name="ofd",
        group="feature maps",
        compares="pre-activations, gated by the ReLU",
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
        """Creates the connectors and determines the margins of the teacher's channels.

        Raises:
            ValueError: If the networks differ in the number of pre-activations, or those of the
                teacher are not inputs of ReLUs.
        """
        pairs = paired(student.preactivations, teacher.preactivations, self.skip, "pre-activations")
        check_preactivations(pairs, context, self.skip)
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
        connected = [connect(s) for connect, (s, _) in zip(self.connectors, pairs, strict=True)]
        pooled = [to_smaller(s, t) for s, (_, t) in zip(connected, pairs, strict=True)]
        margins = [self.get_buffer(f"margin{number}") for number in range(len(pairs))]
        return partial_distance([s for s, _ in pooled], [t for _, t in pooled], margins)

    def metadata(self) -> dict[str, Any]:
        """Returns the source of each margin: a batch normalization, or a measurement."""
        return {"margins": self.sources}


def find_margins(
    preactivations: Sequence[Tensor], context: LossContext, skip: int
) -> list[tuple[Tensor, str]]:
    """Determines the margins of the teacher's channels.

    Args:
        preactivations: Compared pre-activations of the teacher, (n, c, h, w) each, shallow to deep.
        context: The teacher, and training images with its features.
        skip: Number of pre-activations skipped before them.

    Returns:
        For each stage, the margins (c,) and a description of their source.
    """
    before: list[tuple[str, nn.BatchNorm2d] | None] = [None] * len(preactivations)
    if context.teacher is not None:
        batch, _ = next(iter(context.teacher_batches(0)))
        taps = context.taps.teacher.preactivations or context.teacher.network.preactivations
        before = normalizations(context.teacher, batch.images[:2], taps)[skip:]
    measured: list[Tensor] = []
    found = []
    for place, preactivation in enumerate(preactivations):
        normalization = before[place]
        if normalization is not None and normalization[1].num_features == preactivation.shape[1]:
            found.append((_margin_of(normalization[1]), normalization[0]))
            continue
        measured = measured or _measure(context)
        found.append((measured[skip + place], f"measured on {MARGIN_BATCHES} batches"))
    return found


def normalizations(
    teacher: Teacher, images: Tensor, taps: Sequence[str]
) -> list[tuple[str, nn.BatchNorm2d] | None]:
    """Finds the batch normalization before each pre-activation of a network.

    This is the last one computed before the tap reads, among those whose output has the shape of
    the pre-activation.

    Args:
        teacher: The network.
        images: Sample images, normalized as for the teacher, (n, 3, h, w).
        taps: Taps of the pre-activations.

    Returns:
        For each tap, the name and the module, or None if there is none.
    """
    network = teacher.network.network
    modules = dict(network.named_modules())
    weight = next(network.parameters())
    computed: list[tuple[str, nn.BatchNorm2d, torch.Size]] = []
    found: dict[str, tuple[str, nn.BatchNorm2d] | None] = {}

    def after_normalization(module: nn.BatchNorm2d, name: str, output: Tensor) -> None:
        computed.append((name, module, output.shape))

    def at_tap(tap: str, read: Tensor) -> None:
        candidates = [(name, module) for name, module, shape in computed if shape == read.shape]
        found[tap] = candidates[-1] if candidates else None

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
    """Averages the negative responses of each channel; 0 for a channel without any."""
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for _, features in islice(context.teacher_batches(0), MARGIN_BATCHES):
        for place, t in enumerate(features.preactivations):
            total, count = t.clamp(max=0).sum((0, 2, 3)), (t < 0).sum((0, 2, 3))
            if place == len(sums):
                sums.append(torch.zeros_like(total))
                counts.append(torch.zeros_like(count))
            sums[place] += total
            counts[place] += count
    return [total / count.clamp(min=1) for total, count in zip(sums, counts, strict=True)]
