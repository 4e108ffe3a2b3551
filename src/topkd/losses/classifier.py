"""Losses that look at maps and embeddings through the classifiers that read them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.losses._validation import MAPS, check_floats, check_shapes, count, not_negative
from topkd.losses.base import Loss, LossContext, LossInfo
from topkd.losses.maps import deepest, to_smaller
from topkd.losses.relations import directions
from topkd.models.reused import ReusedClassifierStudent, projector


def last_map(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compares two maps of as many channels, the larger averaged down to the smaller.

    .. math:: \frac{1}{n c h w} \lVert F^s - F^t \rVert^2

    Args:
        student: :math:`F^s`, (n, c, h, w).
        teacher: :math:`F^t`, (n, c, h', w').

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If images or channels differ in number.

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
    """:func:`last_map` of the last maps: what SimKD trains.

    It is meant for a student that answers through its teacher's classifier, a
    :class:`~topkd.models.reused.ReusedClassifierStudent`: its last map is the projected one, and
    this is the only loss it needs. The teacher's map must be the one whose averages its classifier
    reads, such as that of the tap ``avgpool:in``. A student with a classifier of its own, which
    this loss does not train, is given the same projector where the channels differ; it then needs
    another term.

    References:
        Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022)
        https://arxiv.org/abs/2203.14001
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
        self.project: nn.Module | None = None
        self._metadata: dict[str, Any] = {}

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Creates a projector, where the student has none.

        Raises:
            ValueError: If one of the networks has no maps.
        """
        channels, wide = deepest(student, "student").shape[1], deepest(teacher, "teacher").shape[1]
        network = context.student.network
        if isinstance(network, ReusedClassifierStudent):
            self._metadata = {"classifier": "the teacher's", "weights_brought": network.brought}
            return
        self._metadata = {"classifier": "the student's own, which this term does not train"}
        if channels != wide:
            self.project = projector(channels, wide)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        own = deepest(student, "student")
        return last_map(
            own if self.project is None else self.project(own), deepest(teacher, "teacher")
        )

    def metadata(self) -> dict[str, Any]:
        """Returns whose classifier the student has, and how many weights that adds."""
        return self._metadata


class SRRL(Loss):
    r"""Compares embeddings, and what the teacher's classifier makes of them (SRRL).

    .. math:: \frac{1}{nd} \lVert r - f^t \rVert^2
        + \frac{w}{nc} \lVert h^t(r) - z^t \rVert^2, \qquad
        r = \mathrm{pool}\big(\mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}(F^s)))\big)

    where :math:`F^s` is the student's last map, the convolution is 1x1, pool averages every channel
    and :math:`h^t` is the teacher's classifier, which stays as it is. The map is projected and
    then averaged, as in the authors' code; SimKD's copy of the method projects the averages.

    Args:
        logits: w; others use 5 on CIFAR-100.

    References:
        Knowledge Distillation via Softmax Regression Representation Learning (Yang et al.,
        ICLR 2021)
        https://openreview.net/forum?id=ZzwDy_wiWv
    """

    info = LossInfo(
        name="srrl",
        group="classifier",
        compares="embeddings, and what the teacher's classifier makes of them",
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
        """Creates the projection and refers to the teacher's classifier.

        Raises:
            ValueError: If the student has no maps.
        """
        assert context.teacher is not None
        channels, width = deepest(student, "student").shape[1], teacher.embedding.shape[1]
        self._teacher = [context.teacher.network]  # in a list: its weights are not this loss's
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
    r"""Computes where in an image a classifier sees each class.

    .. math:: M_c = \sum_k W_{ck} F_k

    Averaged over the places, and with the bias, these are the logits.

    Args:
        last: The map F whose averages the classifier reads, (n, d, h, w).
        classifier: Linear, or a 1x1 convolution, with the weight W, (classes, d).

    Returns:
        Maps (n, classes, h, w).

    Raises:
        ValueError: If the classifier has no such weight, or does not read so many channels.

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
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim not in (2, 4) or weight[0, 0].numel() != 1:
        raise ValueError(f"class maps need a classifier of one linear layer, got {classifier}")
    if last.shape[1] != weight.shape[1]:
        raise ValueError(
            f"the classifier reads {weight.shape[1]} numbers, but the last map has {last.shape[1]} "
            "channels; tap the map whose averages it reads, such as avgpool:in"
        )
    return torch.einsum("kd,ndhw->nkhw", weight.flatten(1).to(last.dtype), last)


def class_attention(
    student: Tensor, teacher: Tensor, *, resolution: int = 2, normalize: bool = False
) -> Tensor:
    r"""Compares where two networks see each class, coarsely.

    .. math:: \frac{1}{n c r^2} \sum_{i,c} \lVert P(M^s_{ic}) - P(M^t_{ic}) \rVert^2

    where P averages a map down to r x r places and, if asked, divides the result by its norm.

    Args:
        student: Class maps :math:`M^s`, (n, classes, h, w).
        teacher: Class maps :math:`M^t`, (n, classes, h', w').
        resolution: r.
        normalize: Whether each map is divided by its norm over the places.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If images or classes differ in number.

    References:
        Class Attention Transfer Based Knowledge Distillation (Guo et al., CVPR 2023)
        https://arxiv.org/abs/2304.12777
    """
    check_shapes("class maps", student, teacher, 2, MAPS)
    _checked_resolution(resolution)
    s, t = (F.adaptive_avg_pool2d(seen, resolution).flatten(2) for seen in (student, teacher))
    return F.mse_loss(directions(s), directions(t)) if normalize else F.mse_loss(s, t)


def _checked_resolution(resolution: int) -> int:
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    return resolution


class CATKD(Loss):
    """:func:`class_attention` of the :func:`class_maps` of both networks (CAT-KD).

    The weight of the student's classifier is read anew each time and learns from this loss too.

    Args:
        resolution: Places on a side that the maps are averaged down to.
        normalize: Whether each map is divided by its norm; for networks of different families.

    References:
        Class Attention Transfer Based Knowledge Distillation (Guo et al., CVPR 2023)
        https://arxiv.org/abs/2304.12777
    """

    info = LossInfo(
        name="cat",
        group="classifier",
        compares="where in the last maps each class is seen",
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
        """Refers to both classifiers, and checks that they read the last maps.

        Raises:
            ValueError: If a classifier is no single linear layer on the channels of the last map.
        """
        assert context.teacher is not None
        networks = [context.student, context.teacher.network]
        for name, made, network in zip(
            ("student", "teacher"), (student, teacher), networks, strict=True
        ):
            try:
                class_maps(deepest(made, name), network.classifier)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        self._networks = networks  # in a list: their weights are not this loss's

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        # A classifier reads averages as it reads places, and these are fewer.
        s, t = (
            class_maps(F.adaptive_avg_pool2d(made.maps[-1], self.resolution), network.classifier)
            for made, network in zip((student, teacher), self._networks, strict=True)
        )
        return class_attention(s, t, resolution=self.resolution, normalize=self.normalize)
