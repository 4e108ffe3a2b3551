"""A loss on the flow of solution procedure (FSP) between feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.features import Batch, Features
from topkd.losses._validation import MAPS, check_floats, one_of, skipped
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import paired, to_smaller
from topkd.losses.regression import mean_square

Pooling = Literal["average", "maximum"]


def fsp_matrix(shallow: Tensor, deep: Tensor, *, pooling: Pooling = "average") -> Tensor:
    r"""Computes the flow of solution procedure between two maps of a network.

    .. math:: G_{jk} = \frac{1}{p} \sum_x F_{jx} F'_{kx}

    over the p positions x. The larger map is pooled to the size of the smaller first: average
    pooling as in RepDistiller, or maximum pooling as in the paper.

    Args:
        shallow: F, (n, c, h, w).
        deep: F', (n, c', h', w').
        pooling: "average" or "maximum".

    Returns:
        The matrices G, (n, c, c').

    Raises:
        ValueError: If the tensors are not maps of the same images, or the pooling is unknown.

    References:
        A Gift from Knowledge Distillation (Yim et al., CVPR 2017)
        https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html

    Examples:
        >>> one_hot = torch.eye(4).view(1, 4, 2, 2)  # channel j is active at position j only
        >>> fsp_matrix(one_hot, one_hot)[0].diagonal()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    for name, maps in (("shallow", shallow), ("deep", deep)):
        check_floats(f"the {name} maps", maps, MAPS)
    if len(shallow) != len(deep):
        raise ValueError(
            f"maps must be of the same images, got shallow {tuple(shallow.shape)}, "
            f"deep {tuple(deep.shape)}"
        )
    one_of("pooling", pooling, Pooling)
    pool = F.adaptive_max_pool2d if pooling == "maximum" else F.adaptive_avg_pool2d
    shallow, deep = (m.flatten(2) for m in to_smaller(shallow, deep, pool))
    return shallow @ deep.mT / shallow.shape[2]


class FSP(Loss):
    r"""Compares the FSP matrices of consecutive maps.

    .. math:: \sum_l \frac{1}{n c_l c_{l+1}} \sum_i \lVert G^s_{il} - G^t_{il} \rVert^2

    where G is the :func:`fsp_matrix`. In the paper and in RepDistiller, this is the only loss in
    the first epochs and the cross-entropy the only one after them: set ``start`` and ``stop`` of
    the terms in a recipe. Maps must be ordered from shallow to deep, and have the same number of
    channels and, beyond the first, the same size in both networks.

    Args:
        skip: Number of maps skipped at the shallow end; the first map is that of the stem.
        pooling: Pooling of the larger of two maps, "average" or "maximum".

    Raises:
        ValueError: If an option is out of range.

    References:
        A Gift from Knowledge Distillation (Yim et al., CVPR 2017)
        https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html

    Examples:
        >>> maps = [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)]
        >>> features = Features(torch.zeros(2, 10), torch.zeros(2, 8), maps)
        >>> loss = FSP(pooling="maximum")
        >>> loss.setup(features, features, context=None)
        >>> loss(features, features, batch=None).item()
        0.0
    """

    info = LossInfo(
        name="fsp",
        group="feature maps",
        compares="products of consecutive feature maps",
        paper="Yim et al., CVPR 2017",
        url="https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html",
        cost="n d k with k channels, the same number in both networks",
        any_width=False,
    )

    reads_maps = True

    def __init__(self, *, skip: int = 0, pooling: Pooling = "average") -> None:
        super().__init__()
        self.skip = skipped(skip)
        self.pooling = one_of("pooling", pooling, Pooling)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Checks that the maps can be compared.

        Raises:
            ValueError: If the networks differ in the number of maps, in their channels or in the
                size of consecutive maps, if maps become larger, or if there are fewer than two.
        """
        pairs = paired(student.maps, teacher.maps, self.skip)
        if len(pairs) < 2:
            raise ValueError(
                f"fsp compares consecutive maps and needs at least two, got {len(pairs)}"
            )
        differing = [
            f"map {place} has {s.shape[1]} and {t.shape[1]}"
            for place, (s, t) in enumerate(pairs, self.skip)
            if s.shape[1] != t.shape[1]
        ]
        if differing:
            raise ValueError(
                "fsp needs as many channels in the student as in the teacher, but "
                f"{', '.join(differing)}; select matching maps with the term's taps, or use at, "
                "nst or vid, for which channels may differ"
            )
        check_sizes(pairs, self.skip)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = paired(student.maps, teacher.maps, self.skip)
        values = [
            mean_square(
                fsp_matrix(s, next_s, pooling=self.pooling),
                fsp_matrix(t, next_t, pooling=self.pooling),
            )
            for (s, t), (next_s, next_t) in pairwise(pairs)
        ]
        return torch.stack(values).sum()


def check_sizes(pairs: Sequence[tuple[Tensor, Tensor]], skip: int) -> None:
    """Checks that consecutive maps can be the start and the end of a stage, of the same size.

    The larger of two consecutive maps is pooled, so the size of the matrices' maps is that of the
    deeper one, which must be the smaller.

    Args:
        pairs: Maps of the student and of the teacher, without the skipped ones.
        skip: Number of maps skipped before them.

    Raises:
        ValueError: If a map is larger than the one before it, or the networks' sizes differ.
    """
    for number, (shallow, deep) in enumerate(pairwise(pairs), skip + 1):
        for role, before, after in zip(("student", "teacher"), shallow, deep, strict=True):
            if after.shape[2] > before.shape[2] or after.shape[3] > before.shape[3]:
                raise ValueError(
                    f"map {number} of the {role} is larger than the one before it, "
                    f"{_size(after)} after {_size(before)}; order the term's taps.{role}.maps from "
                    "shallow to deep"
                )
        if deep[0].shape[2:] != deep[1].shape[2:]:
            raise ValueError(
                f"map {number} has {_size(deep[0])} positions in the student and {_size(deep[1])} "
                "in the teacher, but fsp averages products of two maps over the same positions; "
                "select maps of the same size with the term's taps"
            )


def _size(maps: Tensor) -> str:
    return " x ".join(map(str, maps.shape[2:]))
