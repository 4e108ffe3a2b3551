"""Losses on feature maps as they are, without weights of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import MAPS, check_shapes, one_of, skipped
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.topology.gradient import SMALL, bounded_divide


def paired(
    student: Sequence[Tensor], teacher: Sequence[Tensor], skip: int = 0, kind: str = "maps"
) -> list[tuple[Tensor, Tensor]]:
    """Pairs the maps of two networks by their place, shallow to deep.

    Args:
        student: Maps (n, c, h, w), with sizes that may differ.
        teacher: As many.
        skip: How many are left out at the shallow end.
        kind: What they are, for messages.

    Raises:
        ValueError: If they differ in number or in images, if one is no map, or if none is left.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"the student has {len(student)} {kind} and the teacher {len(teacher)}, which are "
            "compared one by one; let the term's taps in the recipe choose as many of both"
        )
    if not 0 <= skip < len(student):
        raise ValueError(
            f"skip leaves out the first {skip} of {len(student)} {kind}; it must be at least 0 and "
            "leave one"
        )
    pairs = list(zip(student, teacher, strict=True))[skip:]
    for s, t in pairs:
        if s.ndim != 4 or t.ndim != 4 or len(s) != len(t):
            raise ValueError(
                f"{kind} must be (n, c, h, w) of the same images, got {tuple(s.shape)} of the "
                f"student and {tuple(t.shape)} of the teacher"
            )
    return pairs


def to_smaller(
    first: Tensor,
    second: Tensor,
    pool: Callable[[Tensor, tuple[int, int]], Tensor] = F.adaptive_avg_pool2d,
) -> tuple[Tensor, Tensor]:
    """Pools the larger of two maps (n, c, h, w) to the height and width of the smaller."""
    if first.shape[2:] == second.shape[2:]:
        return first, second
    height, width = (min(sides) for sides in zip(first.shape[2:], second.shape[2:], strict=True))
    return pool(first, (height, width)), pool(second, (height, width))


def deeper_counts_double(values: Sequence[Tensor]) -> Tensor:
    """Adds values of L stages, shallow to deep: the last whole, each before it half of the next."""
    return torch.stack([value / 2**back for back, value in enumerate(values[::-1])]).sum()


def deepest(features: Features, whose: str) -> Tensor:
    """Finds the last map of a network.

    Raises:
        ValueError: If it has none, or it is not (n, c, h, w).
    """
    if not features.maps:
        raise ValueError(f"the {whose} has no maps: give the taps where they can be read")
    if features.maps[-1].ndim != 4:
        raise ValueError(f"the last map of the {whose} is {tuple(features.maps[-1].shape)}, no map")
    return features.maps[-1]


class MapLoss(Loss):
    """The sum over stages of a loss of two maps.

    Args:
        skip: How many maps are left out at the shallow end; the first is that of the stem.
    """

    reads_maps = True

    def __init__(self, *, skip: int = 1) -> None:
        super().__init__()
        self.skip = skipped(skip)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Checks that the maps can be compared.

        Raises:
            ValueError: If the networks differ in the number of maps.
        """
        paired(student.maps, teacher.maps, self.skip)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = paired(student.maps, teacher.maps, self.skip)
        return torch.stack([self.compare(s, t) for s, t in pairs]).sum()

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compares the maps of one stage."""


SILENT = 1e-3  # length of a channel's map below which its direction is noise

AttentionForm = Literal["mean", "paper"]


def attention_transfer(student: Tensor, teacher: Tensor, *, form: AttentionForm = "mean") -> Tensor:
    r"""Compares where two networks look, by the energy of their maps over space.

    .. math:: \frac{1}{np} \sum_i \lVert Q(F^s_i) - Q(F^t_i) \rVert^2,
        \qquad Q(F) = \frac{q}{\lVert q \rVert}, \quad q = \frac{1}{c} \sum_k F_k^2

    for n images and p positions; the larger map is averaged to the size of the smaller first. This
    is what the authors' code and RepDistiller compute. The paper writes the norm without the
    square and without the mean over positions: ``form="paper"`` computes
    :math:`\frac{1}{n} \sum_i \lVert Q(F^s_i) - Q(F^t_i) \rVert`. (In torchdistill that is a sum
    over the images: n times as much.)

    Args:
        student: A map, (n, c, h, w).
        teacher: A map of the same images; channels and size may differ.
        form: Which of the two.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If these are no maps of the same images.

    References:
        Paying More Attention to Attention (Zagoruyko & Komodakis, ICLR 2017)
        https://arxiv.org/abs/1612.03928

    Examples:
        >>> left, right = torch.zeros(1, 3, 1, 2), torch.zeros(1, 5, 1, 2)
        >>> left[..., 0], right[..., 1] = 1.0, 7.0  # they look at different places
        >>> attention_transfer(left, right).item()
        1.0
    """
    check_shapes("maps", student, teacher, 1, MAPS)
    one_of("form", form, AttentionForm)
    maps = to_smaller(student, teacher)
    energies = (torch.linalg.vecdot(m, m, dim=1) / m.shape[1] for m in maps)
    rows = [energy.flatten(1) for energy in energies]
    seen, aim = (bounded_divide(q, q.norm(dim=1, keepdim=True), SMALL**2) for q in rows)
    if form == "paper":
        return torch.linalg.vector_norm(seen - aim, dim=1).mean()
    return F.mse_loss(seen, aim)


class AT(MapLoss):
    """The sum over stages of :func:`attention_transfer`.

    Args:
        skip: How many maps are left out at the shallow end; the first is that of the stem.
        form: "mean", the usual one, or "paper".

    References:
        Paying More Attention to Attention (Zagoruyko & Komodakis, ICLR 2017)
        https://arxiv.org/abs/1612.03928
    """

    info = LossInfo(
        name="at",
        group="feature maps",
        compares="where feature maps have their energy",
        paper="Zagoruyko & Komodakis, ICLR 2017",
        url="https://arxiv.org/abs/1612.03928",
        cost="n d",
    )

    def __init__(self, *, skip: int = 1, form: AttentionForm = "mean") -> None:
        super().__init__(skip=skip)
        self.form = one_of("form", form, AttentionForm)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_transfer(student, teacher, form=self.form)


def neuron_selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares for which patterns two networks have neurons: a maximum mean discrepancy.

    .. math:: \frac{1}{n} \sum_i \Big[ \frac{1}{c_s^2} \sum_{jk} (s_j \cdot s_k)^2
        + \frac{1}{c_t^2} \sum_{jk} (t_j \cdot t_k)^2
        - \frac{2}{c_s c_t} \sum_{jk} (s_j \cdot t_k)^2 \Big]

    where :math:`s_j` is channel j of image i as a unit vector over space, or what there is of it a
    thousand times where it is shorter than 0.001, so that silent channels stay silent. The larger
    map is averaged to the size of the smaller first. The middle term depends on the teacher alone
    and is left out in RepDistiller, whose gradient is the same.

    With S the matrix of all :math:`s_j`, this also is :math:`\lVert S^\top S / c_s - T^\top T / c_t
    \rVert^2`, which is computed where maps have fewer positions than channels. So it needs no more
    than the smaller of positions² and channels² of memory for each image.

    Args:
        student: A map, (n, c, h, w).
        teacher: A map of the same images; channels and size may differ.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If these are no maps of the same images.

    References:
        Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (Huang & Wang, 2017)
        https://arxiv.org/abs/1707.01219

    Examples:
        >>> maps = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> neuron_selectivity(maps.flip(1), maps).abs().item() < 1e-6  # which neuron: no matter
        True
    """
    check_shapes("maps", student, teacher, 1, MAPS)
    s, t = (F.normalize(m.flatten(2), dim=2, eps=SILENT) for m in to_smaller(student, teacher))
    _, c_s, positions = s.shape
    c_t = t.shape[1]
    if positions**2 < c_s * c_t:
        gap = s.mT @ s / c_s - t.mT @ t / c_t
        return gap.square().sum((1, 2)).mean()
    kernels = [(a @ b.mT).square().mean() for a, b in ((s, s), (t, t), (s, t))]
    return kernels[0] + kernels[1] - 2 * kernels[2]


class NST(MapLoss):
    """The sum over stages of :func:`neuron_selectivity`.

    Args:
        skip: How many maps are left out at the shallow end; the first is that of the stem.

    References:
        Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (Huang & Wang, 2017)
        https://arxiv.org/abs/1707.01219
    """

    info = LossInfo(
        name="nst",
        group="feature maps",
        compares="which patterns channels respond to",
        paper="Huang & Wang 2017",
        url="https://arxiv.org/abs/1707.01219",
        cost="n d k, k the smaller of channels and positions",
    )

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return neuron_selectivity(student, teacher)
