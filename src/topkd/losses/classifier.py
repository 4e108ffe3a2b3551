"""Losses on maps and embeddings that use a network's classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._places import check_classifier, check_reused, pooled_taps, read_map
from topkd.losses._validation import MAPS, check_floats, check_shapes, count, not_negative
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import deepest, to_smaller
from topkd.losses.relations import directions
from topkd.models.reused import ReusedClassifierStudent


def last_map(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares two maps with the same number of channels, average-pooled to the smaller size.

    .. math:: \frac{1}{n c h w} \lVert F^s - F^t \rVert^2

    Args:
        student: :math:`F^s`, (n, c, h, w).
        teacher: :math:`F^t`, (n, c, h', w').

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the numbers of images or channels differ.

    References:
        Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022)
        https://arxiv.org/abs/2203.14001

    Examples:
        >>> large = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
        >>> last_map(torch.tensor([[[[6.0]]]]), large)
        tensor(4.)
    """
    check_shapes("maps", student, teacher, 2, MAPS)
    return F.mse_loss(*to_smaller(student, teacher))


class SimKD(Loss):
    """:func:`last_map` of the maps that both classifiers average: the feature loss of SimKD.

    The student must be a :class:`~topkd.models.reused.ReusedClassifierStudent`, which uses its
    teacher's classifier: ``student.classifier: teacher`` in a recipe, or
    :func:`topkd.models.reused.reuse`. As in the authors' code, it average-pools a map larger than
    the teacher's before the projector. Its last map is the projected one, and no other loss is
    needed. The teacher's map is the one whose averages its classifier reads. This is its last map,
    or one that a forward pass finds.

    References:
        Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022)
        https://arxiv.org/abs/2203.14001

    Examples:
        >>> from topkd import Distiller
        >>> from topkd.features import Teacher
        >>> from topkd.models import create, wrap
        >>> from topkd.models.reused import reuse
        >>> images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
        >>> teacher = Teacher(wrap(create("wrn_16_1", classes=10)))
        >>> student = reuse(wrap(create("resnet8", classes=10)), teacher, images)
        >>> distiller = Distiller(student, teacher, [SimKD()]).setup(images)
        >>> distiller(images, target).loss.shape
        torch.Size([])
    """

    info = LossInfo(
        name="simkd",
        group="classifier",
        compares="last maps, for a student with its teacher's classifier",
        paper="Chen et al., CVPR 2022",
        url="https://arxiv.org/abs/2203.14001",
        cost="n d, a projector that stays in the student",
    )

    reads_maps = True
    replaces_classifier = True

    def __init__(self) -> None:
        super().__init__()
        self._metadata: dict[str, Any] = {}

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Finds the map that the teacher's classifier averages, and checks the student's.

        Raises:
            ValueError: If the student does not use its teacher's classifier, or a classifier does
                not read the averages of a map.
        """
        network = context.student.network
        if not isinstance(network, ReusedClassifierStudent):
            raise ValueError(
                f"the student ({type(network).__name__}) must use its teacher's classifier: set "
                "student.classifier=teacher, or build it with topkd.models.reused.reuse"
            )
        self._taps = pooled_taps(student, teacher, context)
        check_reused(student, teacher, context)
        self._metadata = {"classifier": "the teacher's", "weights_brought": network.brought}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        made, asked = self._taps
        return last_map(read_map(student, made), read_map(teacher, asked))

    def metadata(self) -> dict[str, Any]:
        """Returns whose classifier the student uses, and the number of weights that this adds."""
        return self._metadata


class SRRL(Loss):
    r"""Compares embeddings, and the teacher classifier's logits for them, SRRL.

    .. math:: \frac{1}{nd} \lVert r - f^t \rVert^2
        + \frac{w}{nc} \lVert h^t(r) - z^t \rVert^2, \qquad
        r = \mathrm{pool}\big(\mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}(F^s)))\big)

    where :math:`F^s` is the student's last map, the convolution is 1x1, pool is global average
    pooling and :math:`h^t` is the teacher's frozen classifier, which must compute the teacher's
    logits from its embedding. As in the authors' code, the map is projected and then averaged; the
    copy in SimKD's repository projects the average.

    Args:
        logits: Weight w of the logits; 5 is common on CIFAR-100.

    Raises:
        ValueError: If ``logits`` is negative.

    References:
        Knowledge Distillation via Softmax Regression Representation Learning (Yang et al.,
        ICLR 2021)
        https://openreview.net/forum?id=ZzwDy_wiWv

    Examples:
        >>> from topkd import Distiller
        >>> from topkd.losses import CE
        >>> from topkd.models import create
        >>> images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
        >>> student, teacher = (create(name, classes=10) for name in ("resnet8", "wrn_16_1"))
        >>> distiller = Distiller(student, teacher, [CE(), SRRL(logits=5.0)]).setup(images)
        >>> sorted(distiller(images, target).values)
        ['ce', 'srrl']
    """

    info = LossInfo(
        name="srrl",
        group="classifier",
        compares="embeddings, and the teacher classifier's logits for them",
        paper="Yang et al., ICLR 2021",
        url="https://openreview.net/forum?id=ZzwDy_wiWv",
        cost="n d², one convolution",
        zero=False,
    )

    reads_maps = True

    def __init__(self, *, logits: float = 1.0) -> None:
        super().__init__()
        self.logits = not_negative("logits", logits)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates the projection and stores a reference to the teacher's classifier.

        Raises:
            ValueError: If the student has no maps, or the teacher's classifier does not compute its
                logits from its embedding.
        """
        assert context.teacher is not None
        check_classifier("teacher", teacher, context)
        channels, width = deepest(student, "student").shape[1], teacher.embedding.shape[1]
        self._teacher = [context.teacher.network]  # in a list: not a submodule of this loss
        convolution = nn.Conv2d(channels, width, 1, bias=False)
        self.project = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        (network,) = self._teacher
        embedding = self.project(deepest(student, "student")).mean((2, 3))
        weight = next(network.classifier.parameters())
        logits = network.head(embedding.to(weight.dtype)).to(embedding.dtype)
        regression = F.mse_loss(logits, teacher.logits.to(logits.dtype))
        return F.mse_loss(embedding, teacher.embedding) + self.logits * regression


def class_maps(last: Tensor, classifier: nn.Module) -> Tensor:
    r"""Computes the class activation maps of a classifier.

    .. math:: M_c = \sum_k W_{ck} F_k

    The average over the positions, plus the bias, gives the logits.

    Args:
        last: The input F of the global average pooling, (n, d, h, w).
        classifier: A linear layer, or a 1x1 convolution, with the weight W, (classes, d).

    Returns:
        Maps (n, classes, h, w).

    Raises:
        ValueError: If the classifier has no such weight, or expects another number of channels.

    References:
        Learning Deep Features for Discriminative Localization (Zhou et al., CVPR 2016)
        https://arxiv.org/abs/1512.04150

    Examples:
        >>> classifier, last = nn.Linear(4, 10), torch.rand(2, 4, 3, 3)
        >>> logits = class_maps(last, classifier).mean((2, 3)) + classifier.bias
        >>> bool(logits.allclose(classifier(last.mean((2, 3))), atol=1e-6))
        True
    """
    check_floats("the last map", last, MAPS)
    weight = linear_weight(classifier)
    if last.shape[1] != weight.shape[1]:
        raise ValueError(
            f"the classifier reads {weight.shape[1]} numbers, but the last map has {last.shape[1]} "
            "channels; tap the input of the global average pooling, such as avgpool:in"
        )
    return torch.einsum("kd,ndhw->nkhw", weight.to(last.dtype), last)


def linear_weight(classifier: nn.Module) -> Tensor:
    """Returns the weight (classes, d) of a linear layer or of a 1x1 convolution.

    Raises:
        ValueError: If the classifier is neither.
    """
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim not in (2, 4) or weight[0, 0].numel() != 1:
        raise ValueError(f"class maps need a classifier of one linear layer, got {classifier}")
    return weight.flatten(1)


def class_attention(
    student: Tensor, teacher: Tensor, *, resolution: int = 2, normalize: bool = False
) -> Tensor:
    r"""Compares pooled class activation maps.

    .. math:: \frac{1}{n c r^2} \sum_{i,c} \lVert P(M^s_{ic}) - P(M^t_{ic}) \rVert^2

    where P average-pools a map to r x r positions and, optionally, divides the result by its norm.

    Args:
        student: Class maps :math:`M^s`, (n, classes, h, w).
        teacher: Class maps :math:`M^t`, (n, classes, h', w').
        resolution: Height and width r of the pooled maps.
        normalize: Whether each map is divided by its norm over the positions.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the numbers of images or classes differ, or ``resolution`` is below 1.

    References:
        Class Attention Transfer Based Knowledge Distillation (Guo et al., CVPR 2023)
        https://arxiv.org/abs/2304.12777

    Examples:
        >>> maps = torch.rand(2, 10, 4, 4)
        >>> class_attention(3 * maps, maps, normalize=True).item() < 1e-9
        True
    """
    check_shapes("class maps", student, teacher, 2, MAPS)
    count("resolution", resolution)
    s, t = (F.adaptive_avg_pool2d(maps, resolution).flatten(2) for maps in (student, teacher))
    return F.mse_loss(directions(s), directions(t)) if normalize else F.mse_loss(s, t)


class CATKD(Loss):
    """:func:`class_attention` of the :func:`class_maps` of both networks, CAT-KD.

    The maps are those whose averages over all positions are the input of the classifier: the last
    ones, or those that a forward pass finds, such as the output of the last ReLU of a wide ResNet.
    Networks without such a map are refused: transformers with a class token, and networks that
    normalize the averages. The current weight of the student's classifier is used, and receives a
    gradient from this loss.

    Args:
        resolution: Height and width of the pooled maps.
        normalize: Whether each map is divided by its norm; for networks of different families.

    Raises:
        ValueError: If ``resolution`` is not a positive integer.

    References:
        Class Attention Transfer Based Knowledge Distillation (Guo et al., CVPR 2023)
        https://arxiv.org/abs/2304.12777

    Examples:
        >>> from topkd import Distiller
        >>> from topkd.losses import CE
        >>> from topkd.models import create
        >>> images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
        >>> student, teacher = (create(name, classes=10) for name in ("resnet8", "wrn_16_1"))
        >>> distiller = Distiller(student, teacher, [CE(), 0.7 * CATKD()]).setup(images)
        >>> sorted(distiller(images, target).values)
        ['cat', 'ce']
    """

    info = LossInfo(
        name="cat",
        group="classifier",
        compares="class activation maps of the last maps",
        paper="Guo et al., CVPR 2023",
        url="https://arxiv.org/abs/2304.12777",
        cost="n c d",
        zero=False,
    )

    reads_maps = True

    def __init__(self, *, resolution: int = 2, normalize: bool = False) -> None:
        super().__init__()
        self.resolution, self.normalize = count("resolution", resolution), normalize

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Stores references to both classifiers, and finds the maps that they average.

        Raises:
            ValueError: If a classifier is not a single linear layer, or does not read the averages
                of a map.
        """
        assert context.teacher is not None
        networks = [context.student, context.teacher.network]
        for role, network in zip(("student", "teacher"), networks, strict=True):
            try:
                linear_weight(network.classifier)
            except ValueError as error:
                raise ValueError(f"{role}: {error}") from error
        self._taps = pooled_taps(student, teacher, context)
        self._networks = networks  # in a list: not submodules of this loss

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        # Pooling and class maps are linear and commute; pooling first is cheaper.
        s, t = (
            class_maps(
                F.adaptive_avg_pool2d(read_map(features, tap), self.resolution), network.classifier
            )
            for features, tap, network in zip(
                (student, teacher), self._taps, self._networks, strict=True
            )
        )
        return class_attention(s, t, resolution=self.resolution, normalize=self.normalize)
