"""Parameter-free losses on feature maps."""

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
    """Pairs the maps of two networks by position, shallow to deep.

    Args:
        student: Maps (n, c, h, w); sizes may differ.
        teacher: The same number of maps.
        skip: Number of maps skipped at the shallow end.
        kind: Kind of the maps, for messages.

    Returns:
        Pairs of a student and a teacher map.

    Raises:
        ValueError: If the numbers of maps or images differ, a tensor is not (n, c, h, w), or no map
            is left.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"the student has {len(student)} {kind} and the teacher {len(teacher)}; maps are "
            "compared in pairs, so select the same number with the term's taps"
        )
    if not 0 <= skip < len(student):
        raise ValueError(
            f"skip leaves out the first {skip} of {len(student)} {kind}; it must be at least 0 and "
            "leave at least one"
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
    """Pools two maps (n, c, h, w) to the smaller height and the smaller width of the two."""
    if first.shape[2:] == second.shape[2:]:
        return first, second
    height, width = (min(sides) for sides in zip(first.shape[2:], second.shape[2:], strict=True))
    return pool(first, (height, width)), pool(second, (height, width))


def depth_weighted_sum(values: Sequence[Tensor]) -> Tensor:
    """Sums values of L stages, shallow to deep, with weights 2^(1 - L), ..., 1/2, 1."""
    return torch.stack([value / 2**back for back, value in enumerate(values[::-1])]).sum()


def deepest(features: Features, whose: str) -> Tensor:
    """Returns the last map of a network.

    Raises:
        ValueError: If there is none, or it is not (n, c, h, w).
    """
    if not features.maps:
        raise ValueError(f"the {whose} has no maps: specify the taps of its feature maps")
    if features.maps[-1].ndim != 4:
        shape = tuple(features.maps[-1].shape)
        raise ValueError(f"the last map of the {whose} must be (n, c, h, w), got {shape}")
    return features.maps[-1]


class MapLoss(Loss):
    """Base class: the sum over stages of a loss between two maps.

    Args:
        skip: Number of maps skipped at the shallow end; the first map is that of the stem.

    Raises:
        ValueError: If ``skip`` is negative.
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
        """Computes the loss of one stage.

        Args:
            student: A map, (n, c, h, w).
            teacher: A map of the same images; channels and size may differ.

        Returns:
            The loss, a scalar.
        """


MIN_CHANNEL_NORM = 1e-3  # norm of a channel below which its direction is noise

AttentionForm = Literal["mean", "paper"]


def attention_transfer(student: Tensor, teacher: Tensor, *, form: AttentionForm = "mean") -> Tensor:
    r"""Compares spatial attention maps, the energy of feature maps at each position.

    .. math:: \frac{1}{np} \sum_i \lVert Q(F^s_i) - Q(F^t_i) \rVert^2,
        \qquad Q(F) = \frac{q}{\lVert q \rVert}, \quad q = \frac{1}{c} \sum_k F_k^2

    for n images and p positions; the larger map is average-pooled to the size of the smaller first.
    This is what the authors' code and RepDistiller compute. The paper uses the norm without the
    square and without the mean over positions: ``form="paper"`` computes
    :math:`\frac{1}{n} \sum_i \lVert Q(F^s_i) - Q(F^t_i) \rVert`. (torchdistill sums over the
    images, which gives n times as much.)

    Args:
        student: A map, (n, c, h, w).
        teacher: A map of the same images; channels and size may differ.
        form: "mean" for the mean squared difference, "paper" for the norm.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the tensors are not maps of the same images, or the form is unknown.

    References:
        Paying More Attention to Attention (Zagoruyko & Komodakis, ICLR 2017)
        https://arxiv.org/abs/1612.03928

    Examples:
        >>> left, right = torch.zeros(1, 3, 1, 2), torch.zeros(1, 5, 1, 2)
        >>> left[..., 0], right[..., 1] = 1.0, 7.0  # energy at different positions
        >>> attention_transfer(left, right).item()
        1.0
    """
    check_shapes("maps", student, teacher, 1, MAPS)
    one_of("form", form, AttentionForm)
    maps = to_smaller(student, teacher)
    energies = (torch.linalg.vecdot(m, m, dim=1) / m.shape[1] for m in maps)
    rows = [energy.flatten(1) for energy in energies]
    s, t = (bounded_divide(q, q.norm(dim=1, keepdim=True), SMALL**2) for q in rows)
    if form == "paper":
        return torch.linalg.vector_norm(s - t, dim=1).mean()
    return F.mse_loss(s, t)


class AT(MapLoss):
    """The sum over stages of :func:`attention_transfer`, AT.

    Args:
        skip: Number of maps skipped at the shallow end; the first map is that of the stem.
        form: "mean" for the mean squared difference, "paper" for the norm.

    Raises:
        ValueError: If an option is out of range.

    References:
        Paying More Attention to Attention (Zagoruyko & Komodakis, ICLR 2017)
        https://arxiv.org/abs/1612.03928

    Examples:
        >>> maps = [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)]
        >>> logits, embedding = torch.zeros(2, 10), torch.zeros(2, 8)
        >>> student = Features(logits, embedding, [2 * m for m in maps])
        >>> teacher = Features(logits, embedding, maps)
        >>> AT()(student, teacher, batch=None).item() < 1e-9  # invariant to scale
        True
    """

    info = LossInfo(
        name="at",
        group="feature maps",
        compares="spatial attention of the feature maps",
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
    r"""Compares the selectivity patterns of channels by a maximum mean discrepancy.

    .. math:: \frac{1}{n} \sum_i \Big[ \frac{1}{c_s^2} \sum_{jk} (s_j \cdot s_k)^2
        + \frac{1}{c_t^2} \sum_{jk} (t_j \cdot t_k)^2
        - \frac{2}{c_s c_t} \sum_{jk} (s_j \cdot t_k)^2 \Big]

    where :math:`s_j` is channel j of image i, normalized to a unit vector over the positions. The
    norm is bounded below by 0.001, so inactive channels stay near 0. The larger map is
    average-pooled to the size of the smaller first. The middle term depends on the teacher only;
    RepDistiller omits it, which does not change the gradient.

    With S the matrix of all :math:`s_j`, the loss equals
    :math:`\lVert S^\top S / c_s - T^\top T / c_t \rVert^2`. This form is used where maps have fewer
    positions than channels, so the memory per image is the smaller of positions² and channels².

    Args:
        student: A map, (n, c, h, w).
        teacher: A map of the same images; channels and size may differ.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the tensors are not maps of the same images.

    References:
        Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (Huang & Wang, 2017)
        https://arxiv.org/abs/1707.01219

    Examples:
        >>> maps = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> neuron_selectivity(maps.flip(1), maps).abs().item() < 1e-6  # order of channels ignored
        True
    """
    check_shapes("maps", student, teacher, 1, MAPS)
    s, t = (
        F.normalize(m.flatten(2), dim=2, eps=MIN_CHANNEL_NORM) for m in to_smaller(student, teacher)
    )
    _, c_s, positions = s.shape
    c_t = t.shape[1]
    if positions**2 < c_s * c_t:
        difference = s.mT @ s / c_s - t.mT @ t / c_t
        return difference.square().sum((1, 2)).mean()
    kernels = [(a @ b.mT).square().mean() for a, b in ((s, s), (t, t), (s, t))]
    return kernels[0] + kernels[1] - 2 * kernels[2]


class NST(MapLoss):
    """The sum over stages of :func:`neuron_selectivity`, NST.

    Args:
        skip: Number of maps skipped at the shallow end; the first map is that of the stem.

    Raises:
        ValueError: If ``skip`` is negative.

    References:
        Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (Huang & Wang, 2017)
        https://arxiv.org/abs/1707.01219

    Examples:
        >>> maps = [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)]
        >>> features = Features(torch.zeros(2, 10), torch.zeros(2, 8), maps)
        >>> NST()(features, features, batch=None).abs().item() < 1e-6
        True
    """

    info = LossInfo(
        name="nst",
        group="feature maps",
        compares="selectivity patterns of channels",
        paper="Huang & Wang 2017",
        url="https://arxiv.org/abs/1707.01219",
        cost="n d k, k the smaller of channels and positions",
    )

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return neuron_selectivity(student, teacher)
