"""A loss on all maps, in which deep maps of the student help its shallow ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._validation import MAPS, check_shapes, count
from topkd.losses.base import Loss, LossContext, LossInfo


def hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares two maps as they are and averaged down to 4, 2 and 1 places on a side.

    .. math:: \frac{\sum_k 2^{-k}\, \mathrm{MSE}(P_k F^s, P_k F^t)}{\sum_k 2^{-k}}

    where :math:`P_0` leaves a map as it is, and each next P averages it down to the next of these
    sizes that is smaller than the map.

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
        >>> apart = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])
        >>> hierarchical(apart, torch.zeros(1, 1, 2, 2))  # 1 as they are, 0 averaged
        tensor(0.6667)
    """
    check_shapes("maps", student, teacher, form=MAPS)
    gap, weight, whole = student - teacher, 1.0, 1.0
    value = gap.square().mean()
    for side in (4, 2, 1):
        if side < gap.shape[2]:
            weight /= 2
            whole += weight
            value = value + weight * F.adaptive_avg_pool2d(gap, side).square().mean()
    return value / whole


class Fusion(nn.Module):
    r"""Joins a map with what was made of the deeper ones, and makes a map of the teacher's of it.

    .. math:: x = \mathrm{BN}(\mathrm{conv}(F)), \qquad z = g_1 x + g_2 y, \qquad
        (g_1, g_2) = \sigma(\mathrm{conv}([x; y]))

    with 1x1 convolutions and y the deeper z, brought to the size of x. What is compared with the
    teacher is a normalized 3x3 convolution of z, which is brought to the teacher's size before.

    Args:
        channels: Of the student's map F.
        middle: Channels of x, y and z.
        wide: Channels of the teacher's map.
        deepest: Whether there is no deeper map; then z = x.
    """

    def __init__(self, channels: int, middle: int, wide: int, *, deepest: bool) -> None:
        super().__init__()
        self.enter = _normalized(channels, middle, 1)
        self.leave = _normalized(middle, wide, 3)
        self.gates = None if deepest else nn.Conv2d(2 * middle, 2, 1)

    def forward(
        self, own: Tensor, deeper: Tensor | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Computes what is compared with the teacher's map, of that size, and z."""
        fused = self.enter(own)
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
    """The sum of :func:`hierarchical` over all stages and the embedding (ReviewKD).

    The student's maps, without that of the stem and with the embedding as the deepest, are walked
    from deep to shallow; each is joined with the deeper ones by a :class:`Fusion` and compared
    with the teacher's map before its ReLU, or with its embedding.

    Args:
        preactivations: Whether the student's maps are taken before their ReLU as well, as for
            ImageNet.
        width: Channels in which maps are joined, at most; fewer if the student's embedding is
            narrower.

    References:
        Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021)
        https://arxiv.org/abs/2104.09044
    """

    info = LossInfo(
        name="review",
        group="feature maps",
        compares="all maps and the embedding, deep ones joined to shallow ones",
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
            ValueError: If a network has no such maps, or the numbers of stages differ.
        """
        own = [level.shape[1] for level in _levels(student, self.preactivations, "student")]
        wanted = [level.shape[1] for level in _levels(teacher, True, "teacher")]
        if len(own) != len(wanted):
            raise ValueError(
                "both networks need equally many maps, got "
                f"{len(own) - 1} stages of the student and {len(wanted) - 1} of the teacher"
            )
        middle, last = min(self.width, own[-1]), len(own) - 1
        self.fusions = nn.ModuleList(
            Fusion(channels, middle, wide, deepest=place == last)
            for place, (channels, wide) in enumerate(zip(own, wanted, strict=True))
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        own = _levels(student, self.preactivations, "student")
        wanted = _levels(teacher, True, "teacher")
        values: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, x, t in reversed(list(zip(self.fusions, own, wanted, strict=True))):
            compared, deeper = fusion(x, deeper, t.shape[2:])
            values.append(hierarchical(compared, t))
        return torch.stack(values).sum()


def _levels(features: Features, before: bool, whose: str) -> list[Tensor]:
    """Lists the maps without the stem and, as a map of one place, the embedding."""
    maps = features.preactivations if before else features.maps
    if len(maps) < 2:
        kind = "pre-activations" if before else "maps"
        raise ValueError(f"the {whose} needs {kind} of a stem and a stage, it has {len(maps)}")
    return [*maps[1:], features.embedding[:, :, None, None]]
