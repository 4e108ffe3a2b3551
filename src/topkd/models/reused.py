"""Students with the frozen classifier of their teacher (SimKD)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd.features import FeatureExtractor, Teacher
from topkd.models.places import logits_error, pooled_map, tolerance


class ReusedClassifierStudent(nn.Module):
    r"""A student's body, a projector and a frozen copy of the teacher's classifier.

    The body is a copy of the student without the layers on whose weights its last map does not
    depend: its classifier and other layers after the map are neither stored nor computed. A map
    larger than the teacher's is average-pooled to its size. The teacher's classifier reads the
    averages of the projected map.

    :func:`reuse` determines the sizes and copies the teacher's weights. A network built from a
    description needs weights, all of which its state dict contains.

    Args:
        student: The student, whose network is copied and not changed.
        tap: Tap of the student's feature map that is projected.
        channels: Channels of this map.
        wide: Channels of the teacher's map.
        size: Height and width of the teacher's map.
        classes: Number of classes.
        bias: Whether the teacher's classifier has a bias.
        factor: Channel reduction inside the projector.
        dropped: Names of the student's layers that are left out.

    References:
        Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022)
        https://arxiv.org/abs/2203.14001

    Examples:
        >>> body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                      nn.Linear(4, 10))
        >>> student = FeatureExtractor(body, maps=["0"], head="3")
        >>> network = ReusedClassifierStudent(student, tap="0", channels=4, wide=8, size=(3, 3),
        ...                                   classes=10, bias=True, dropped=["3"])
        >>> network(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        student: FeatureExtractor,
        *,
        tap: str,
        channels: int,
        wide: int,
        size: Sequence[int],
        classes: int,
        bias: bool,
        factor: int = 2,
        dropped: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.description: dict[str, Any] = {
            "tap": tap,
            "channels": channels,
            "wide": wide,
            "size": list(size),
            "classes": classes,
            "bias": bias,
            "factor": factor,
            "dropped": list(dropped),
        }
        maps, before = [*student.maps[:-1], tap], student.preactivations[:-1]
        self.body = student.retapped(maps, before, without=dropped)
        # These only name the shallower maps of the body for taps.
        self.maps = nn.ModuleList(nn.Identity() for _ in student.maps[:-1])
        self.preactivations = nn.ModuleList(nn.Identity() for _ in student.preactivations[:-1])
        self.projector = projector(channels, wide, factor)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(wide, classes, bias).requires_grad_(False)

    @property
    def brought(self) -> int:
        """Number of weights beyond the student's body: projector and classifier."""
        parts = (*self.projector.parameters(), *self.classifier.parameters())
        return sum(weight.numel() for weight in parts)

    def forward(self, images: Tensor) -> Tensor:
        made = self.body(images)
        *shallow, last = made.maps
        for place, seen in zip(self.maps, shallow, strict=True):
            place(seen)
        for place, seen in zip(self.preactivations, made.preactivations, strict=True):
            place(seen)
        return self.classifier(self.avgpool(self.projector(self._fitted(last))).flatten(1))

    def _fitted(self, last: Tensor) -> Tensor:
        height, width = self.description["size"]
        return F.adaptive_avg_pool2d(last, (min(last.shape[2], height), min(last.shape[3], width)))


def projector(channels: int, wide: int, factor: int = 2) -> nn.Sequential:
    """Builds a projector from the student's to the teacher's channels: 1x1, 3x3, 1x1 convolutions.

    Each is followed by batch normalization and ReLU.

    Args:
        channels: Channels of the student's map.
        wide: Channels of the teacher's map.
        factor: Channel reduction inside the projector.

    Raises:
        ValueError: If the factor is out of range.

    References:
        Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022)
        https://arxiv.org/abs/2203.14001
    """
    if not 1 <= factor <= wide:
        raise ValueError(f"factor must be between 1 and the teacher's width {wide}, got {factor}")
    inside = wide // factor
    layers: list[nn.Module] = []
    for entering, leaving, side in ((channels, inside, 1), (inside, inside, 3), (inside, wide, 1)):
        convolution = nn.Conv2d(entering, leaving, side, padding=side // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(leaving), nn.ReLU()]
    return nn.Sequential(*layers)


def reuse(
    student: FeatureExtractor,
    teacher: Teacher,
    images: Tensor,
    *,
    factor: int = 2,
    tap: str | None = None,
    teacher_tap: str | None = None,
) -> FeatureExtractor:
    """Replaces a student's classifier by its teacher's.

    Args:
        student: The student, which is not changed; the result has a copy of its weights.
        teacher: The teacher, whose classifier is copied.
        images: Example input of both networks, used to determine sizes.
        factor: Channel reduction inside the projector.
        tap: Tap of the student's map that is projected. Defaults to its last map.
        teacher_tap: Tap of the map whose averages the teacher's classifier reads. By default, a
            forward pass finds it.

    Returns:
        A :class:`ReusedClassifierStudent` with taps. Its last map is the projected one, its
        embedding consists of the averages of this map, and the teacher's classifier computes its
        logits.

    Raises:
        ValueError: If the teacher's classifier is not one linear layer on the averages of the map,
            or the student's tap does not read a map.
    """
    if tap is None and not student.maps:
        raise ValueError("the student has no maps: give the tap of its last map")
    tap = tap or student.maps[-1]
    weight, bias, size = _classifier(teacher, images, teacher_tap)
    channels, dropped = _explored(student, images, tap)
    network = ReusedClassifierStudent(
        student,
        tap=tap,
        channels=channels,
        wide=weight.shape[1],
        size=size,
        classes=len(weight),
        bias=bias is not None,
        factor=factor,
        dropped=dropped,
    )
    with torch.no_grad():
        network.classifier.weight.copy_(weight)
        if bias is not None:
            network.classifier.bias.copy_(bias)
    return _tapped(network)


def rebuild(student: FeatureExtractor, description: Mapping[str, Any]) -> FeatureExtractor:
    """Builds a network like :func:`reuse`, untrained and without the teacher.

    Args:
        student: An untrained network of the same architecture.
        description: :attr:`ReusedClassifierStudent.description`, which can be stored as JSON.
    """
    return _tapped(ReusedClassifierStudent(student, **description))


def _tapped(network: ReusedClassifierStudent) -> FeatureExtractor:
    maps = [f"maps.{place}" for place in range(len(network.maps))]
    before = [f"preactivations.{place}" for place in range(len(network.preactivations))]
    last = len(network.projector) - 1  # its ReLU
    return FeatureExtractor(
        network, [*maps, "projector"], "classifier", [*before, f"projector.{last}:in"]
    ).train(network.training)


def _classifier(
    teacher: Teacher, images: Tensor, tap: str | None
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Returns weight and bias of a teacher's classifier, and the size of the map it averages."""
    head = teacher.network.classifier
    if not isinstance(head, nn.Linear | nn.Conv2d) or head.weight[0, 0].numel() != 1:
        raise ValueError(f"the teacher's classifier must be one linear layer, got {head}")
    place = pooled_map(teacher, images) if tap is None else None
    if place is not None:
        return head.weight.flatten(1), head.bias, place.size
    if tap is None:
        raise ValueError(
            "the teacher's classifier does not read the averages of any map of "
            f"{type(teacher.network.network).__name__}, or does not return its logits; the student "
            "cannot use it"
        )
    asked = copy.deepcopy(teacher)  # leaves the teacher without this tap
    asked.network.also([tap])
    made = asked(images)
    seen = made.others[tap]
    averages = seen.mean((2, 3)) if seen.ndim == 4 else seen
    error = float("inf")
    if averages.shape == made.embedding.shape:
        error = logits_error(teacher.network, averages, made)
    if not error <= tolerance(made.logits.dtype):
        raise ValueError(
            f"the teacher's classifier does not read the averages of {tap!r}, {tuple(seen.shape)}; "
            "give the tap of the map whose averages it reads"
        )
    height, width = seen.shape[2:] if seen.ndim == 4 else (1, 1)
    return head.weight.flatten(1), head.bias, (height, width)


def _explored(student: FeatureExtractor, images: Tensor, tap: str) -> tuple[int, list[str]]:
    """Returns the channels of a map, and the layers that it does not depend on."""
    body = student.retapped([tap], []).eval().requires_grad_(True)
    weights = dict(body.network.named_parameters())
    with torch.enable_grad():
        last = body(images.to(next(iter(weights.values())).device)).maps[-1]
        if last.ndim != 4:
            raise ValueError(
                f"the student's tap {tap!r} reads {tuple(last.shape)}, which is not a map"
            )
        gradients = torch.autograd.grad(last.sum(), list(weights.values()), allow_unused=True)
    used = {id(w) for w, g in zip(weights.values(), gradients, strict=True) if g is not None}
    dropped = [
        name
        for name, module in body.network.named_modules()
        if list(module.parameters(recurse=False)) and used.isdisjoint(map(id, module.parameters()))
    ]
    return last.shape[1], dropped
