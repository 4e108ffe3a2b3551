"""A loss on activation boundaries: which neurons are active."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._places import check_preactivations
from topkd.losses._validation import check_shapes, positive, skipped
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import depth_weighted_sum, paired
from topkd.losses.regression import regressor


def activation_boundaries(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, margin: float = 1.0
) -> Tensor:
    r"""Compares the signs of pre-activations by a squared hinge loss.

    .. math:: \frac{1}{n} \sum_{l=1}^{L} 2^{l-L} \sum \begin{cases}
        \max(0, s + \mu)^2 & t \le 0 \\ \max(0, \mu - s)^2 & t > 0 \end{cases}

    over all neurons of the n images, with s and t their responses before the ReLU.

    Args:
        student: Pre-activations s of L stages, shallow to deep, (n, c, h, w) each.
        teacher: Pre-activations t of the teacher, of the same shapes.
        margin: Margin :math:`\mu` of the hinge loss.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the pre-activations differ in number or in shape, or the margin is not
            positive.

    References:
        Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons
        (Heo et al., AAAI 2019) https://arxiv.org/abs/1811.03233

    Examples:
        >>> import torch
        >>> teacher = torch.tensor([-0.1, 0.1]).view(1, 2, 1, 1)
        >>> activation_boundaries([30 * teacher], [teacher]).item()  # same signs, beyond the margin
        0.0
        >>> activation_boundaries([-teacher], [teacher]).item()  # 1.1² for each of the two
        2.42...
    """
    positive("margin", margin)
    values = []
    for s, t in paired(student, teacher, kind="pre-activations"):
        check_shapes("pre-activations", s, t)
        sign = (t > 0).to(s.dtype).mul_(2).sub_(1)  # floats: selection by booleans is slower
        values.append((margin - sign * s).relu_().square().sum() / len(s))
    return depth_weighted_sum(values)


class AB(Loss):
    """The :func:`activation_boundaries` loss of all stages, AB.

    Where shapes differ, a convolution and a batch normalization map the student's pre-activations
    to the shape of the teacher's. The loss is a sum over neurons and needs a small weight;
    RepDistiller uses 0.003. There and in the paper, it is the only loss in the first epochs and the
    cross-entropy the only one after them: set ``start`` and ``stop`` of the terms in a recipe.

    The teacher's pre-activations must be inputs of ReLUs, which excludes teachers such as
    MobileNetV2, without a ReLU after a block. Those of the student must have negative values.

    Args:
        skip: Number of pre-activations skipped at the shallow end; the first are those of the stem.
        margin: Margin of the hinge loss.

    Raises:
        ValueError: If an option is out of range.

    References:
        Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons
        (Heo et al., AAAI 2019) https://arxiv.org/abs/1811.03233

    Examples:
        >>> import torch
        >>> from topkd import Distiller
        >>> from topkd.losses import CE
        >>> from topkd.models import create
        >>> images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
        >>> student, teacher = (create(name, classes=10) for name in ("resnet8", "wrn_16_1"))
        >>> losses = [0.003 * AB(margin=0.5), CE().term(start=31)]
        >>> distiller = Distiller(student, teacher, losses, epochs=240).setup(images)
        >>> sorted(distiller(images, target).values)
        ['ab']
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
            ValueError: If the networks differ in the number of pre-activations, those of the
                teacher are not inputs of ReLUs, or are larger but not twice as large.
        """
        pairs = paired(student.preactivations, teacher.preactivations, self.skip, "pre-activations")
        check_preactivations(pairs, context, self.skip)
        self.connectors = nn.ModuleList(
            nn.Identity() if s.shape == t.shape else regressor(s.shape[1:], t.shape[1:], relu=False)
            for s, t in pairs
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        pairs = paired(student.preactivations, teacher.preactivations, self.skip, "pre-activations")
        connected = [connect(s) for connect, (s, _) in zip(self.connectors, pairs, strict=True)]
        return activation_boundaries(connected, [t for _, t in pairs], margin=self.margin)
