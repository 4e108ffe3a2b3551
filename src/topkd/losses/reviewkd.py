"""Knowledge review: deep maps of the student are fused into shallow ones before the comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._validation import MAPS, check_shapes, count
from topkd.losses.base import Loss, LossContext, LossInfo


def hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares two maps at full size and average-pooled to 4x4, 2x2 and 1x1.

    .. math:: \frac{\sum_k 2^{-k}\, \mathrm{MSE}(P_k F^s, P_k F^t)}{\sum_k 2^{-k}}

    where :math:`P_0` is the identity, and each further P pools to the next of these sizes that is
    smaller than the map.

    Args:
        student: :math:`F^s`, (n, c, h, w).
        teacher: :math:`F^t`, (n, c, h, w).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes differ.

    References:
        Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021)
        https://arxiv.org/abs/2104.09044

    Examples:
        >>> checkerboard = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])
        >>> hierarchical(checkerboard, torch.zeros(1, 1, 2, 2))  # 1 at full size, 0 pooled
        tensor(0.6667)
    """
    check_shapes("maps", student, teacher, form=MAPS)
    difference, weight, total_weight = student - teacher, 1.0, 1.0
    value = difference.square().mean()
    for side in (4, 2, 1):
        if side < difference.shape[2]:
            weight /= 2
            total_weight += weight
            value = value + weight * F.adaptive_avg_pool2d(difference, side).square().mean()
    return value / total_weight


class Fusion(nn.Module):
    r"""Fuses a student map with the fused deeper maps, and predicts a teacher map.

    .. math:: x = \mathrm{BN}(\mathrm{conv}(F)), \qquad z = g_1 x + g_2 y, \qquad
        (g_1, g_2) = \sigma(\mathrm{conv}([x; y]))

    with 1x1 convolutions and y the fused map z of the deeper stage, resized to x. The prediction is
    a 3x3 convolution with batch normalization of z, which is resized to the teacher's map first.

    Args:
        channels: Channels of the student's map F.
        middle: Channels of x, y and z.
        wide: Channels of the teacher's map.
        deepest: Whether there is no deeper map; then z = x.

    References:
        Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021)
        https://arxiv.org/abs/2104.09044

    Examples:
        >>> fusion = Fusion(channels=8, middle=4, wide=32, deepest=True)
        >>> predicted, fused = fusion(torch.zeros(2, 8, 4, 4), None, size=(8, 8))
        >>> predicted.shape, fused.shape
        (torch.Size([2, 32, 8, 8]), torch.Size([2, 4, 8, 8]))
    """

    def __init__(self, channels: int, middle: int, wide: int, *, deepest: bool) -> None:
        super().__init__()
        self.enter = _normalized(channels, middle, 1)
        self.leave = _normalized(middle, wide, 3)
        self.gates = None if deepest else nn.Conv2d(2 * middle, 2, 1)

    def forward(
        self, maps: Tensor, deeper: Tensor | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Computes the prediction of the teacher's map, of the given size, and z."""
        fused = self.enter(maps)
        if self.gates is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            gates = self.gates(torch.cat([fused, deeper], 1)).sigmoid()
            fused = gates[:, :1] * fused + gates[:, 1:] * deeper
        fused = F.interpolate(fused, tuple(size), mode="nearest")
        return self.leave(fused), fused


def _normalized(channels: int, wide: int, side: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, wide, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(wide))


class ReviewKD(Loss):
    """The sum of :func:`hierarchical` over all stages and the embedding, ReviewKD.

    The student's maps, without that of the stem and with the embedding as the deepest, are
    processed from deep to shallow. Each is fused with the deeper ones by a :class:`Fusion` and
    compared with the teacher's map before its ReLU, or with the teacher's embedding.

    Args:
        preactivations: Whether to use the student's maps before their ReLU as well, as for
            ImageNet.
        width: Maximum number of channels of the fused maps; fewer if the student's embedding is
            narrower.

    Raises:
        ValueError: If ``width`` is not a positive integer.

    References:
        Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021)
        https://arxiv.org/abs/2104.09044

    Examples:
        >>> maps = [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)]
        >>> features = Features(torch.zeros(2, 10), torch.rand(2, 8), maps, preactivations=maps)
        >>> loss = ReviewKD(width=16)
        >>> loss.setup(features, features, context=None)
        >>> len(loss.fusions)  # one stage after the stem, and the embedding
        2
    """

    info = LossInfo(
        name="review",
        group="feature maps",
        compares="all maps and the embedding, deep maps fused into shallow ones",
        paper="Chen et al., CVPR 2021",
        url="https://arxiv.org/abs/2104.09044",
        cost="n d², two convolutions and a gate for each map",
        zero=False,
    )

    reads_maps = True

    def __init__(self, *, preactivations: bool = False, width: int = 512) -> None:
        super().__init__()
        self.preactivations, self.width = preactivations, count("width", width)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates a fusion for each stage.

        Raises:
            ValueError: If a network lacks the maps, or the numbers of stages differ.
        """
        widths = [level.shape[1] for level in _levels(student, self.preactivations, "student")]
        targets = [level.shape[1] for level in _levels(teacher, True, "teacher")]
        if len(widths) != len(targets):
            raise ValueError(
                "both networks need the same number of maps, got "
                f"{len(widths) - 1} stages of the student and {len(targets) - 1} of the teacher"
            )
        middle, last = min(self.width, widths[-1]), len(widths) - 1
        self.fusions = nn.ModuleList(
            Fusion(channels, middle, wide, deepest=place == last)
            for place, (channels, wide) in enumerate(zip(widths, targets, strict=True))
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        inputs = _levels(student, self.preactivations, "student")
        targets = _levels(teacher, True, "teacher")
        values: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, x, t in reversed(list(zip(self.fusions, inputs, targets, strict=True))):
            predicted, deeper = fusion(x, deeper, t.shape[2:])
            values.append(hierarchical(predicted, t))
        return torch.stack(values).sum()


def _levels(features: Features, before: bool, whose: str) -> list[Tensor]:
    """Lists the maps without that of the stem, and the embedding as a 1x1 map."""
    maps = features.preactivations if before else features.maps
    if len(maps) < 2:
        kind = "pre-activations" if before else "maps"
        raise ValueError(f"the {whose} needs {kind} of a stem and a stage, but has {len(maps)}")
    return [*maps[1:], features.embedding[:, :, None, None]]
