"""A loss on which neurons are active."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._validation import check_shapes, positive, skipped
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import depth_weighted_sum, paired
from topkd.losses.regression import regressor


def activation_boundaries(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, margin: float = 1.0
) -> Tensor:
    r"""Compares on which side of zero neurons are, not how far: the boundary is what is taught.

    .. math:: \frac{1}{n} \sum_{l=1}^{L} 2^{l-L} \sum \begin{cases}
        \max(0, s + \mu)^2 & t \le 0 \\ \max(0, \mu - s)^2 & t > 0 \end{cases}

    over all neurons of the n images, s and t being their responses before the ReLU.

    Args:
        student: Pre-activations s of L stages, shallow to deep, (n, c, h, w) each.
        teacher: Those of the teacher, t, of the same shapes.
        margin: :math:`\mu`, how far behind the boundary is far enough.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the pre-activations differ in number or in shape.

    References:
        Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons
        (Heo et al., AAAI 2019) https://arxiv.org/abs/1811.03233

    Examples:
        >>> import torch
        >>> aim = torch.tensor([-0.1, 0.1]).view(1, 2, 1, 1)
        >>> activation_boundaries([30 * aim], [aim]).item()  # the right sides, and far enough
        0.0
        >>> activation_boundaries([-aim], [aim]).item()  # 1.1² for both of them
        2.42...
    """
    positive("margin", margin)
    values = []
    for s, t in paired(student, teacher, kind="pre-activations"):
        check_shapes("pre-activations", s, t)
        side = (t > 0).to(s.dtype).mul_(2).sub_(1)  # numbers: to choose by booleans takes longer
        values.append((margin - side * s).relu_().square().sum() / len(s))
    return depth_weighted_sum(values)


class AB(Loss):
    """:func:`activation_boundaries` of all stages.

    Where shapes differ, a convolution and a normalization take the student's pre-activations to
    the shape of the teacher's. As it is a sum over neurons, it wants a small weight: RepDistiller's
    is 0.003. There and in the paper it stands alone for the first epochs and the cross-entropy
    after them: ``start`` and ``stop`` of a recipe's terms.

    Args:
        skip: How many are left out at the shallow end; the first are those of the stem.
        margin: How far behind the boundary is far enough.

    References:
        Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons
        (Heo et al., AAAI 2019) https://arxiv.org/abs/1811.03233
    """

    info = LossInfo(
        name="ab",
        group="feature maps",
        compares="which neurons are active",
        paper="Heo et al., AAAI 2019",
        url="https://arxiv.org/abs/1811.03233",
        cost="n d, one convolution a stage where shapes differ",
        zero=False,
    )

    reads_maps = True

    def __init__(self, *, skip: int = 1, margin: float = 1.0) -> None:
        super().__init__()
        self.skip, self.margin = skipped(skip), positive("margin", margin)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates a connector for each stage at which the shapes differ.

        Raises:
            ValueError: If the networks differ in the number of pre-activations, or the teacher's
                are larger but not twice as large.
        """
        pairs = paired(student.preactivations, teacher.preactivations, self.skip, "pre-activations")
        self.connectors = nn.ModuleList(
            nn.Identity() if s.shape == t.shape else regressor(s.shape[1:], t.shape[1:], relu=False)
            for s, t in pairs
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = paired(student.preactivations, teacher.preactivations, self.skip, "pre-activations")
        moved = [connect(s) for connect, (s, _) in zip(self.connectors, pairs, strict=True)]
        return activation_boundaries(moved, [t for _, t in pairs], margin=self.margin)
