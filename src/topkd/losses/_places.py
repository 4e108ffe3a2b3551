"""Checks that losses read the places in a network that their papers mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from topkd.config.terms import View
from topkd.features import FeatureExtractor, Features, Teacher
from topkd.losses.base import LossContext, select
from topkd.losses.maps import deepest
from topkd.models.places import (
    logits_error,
    pooled_map,
    precede_relu,
    relative_error,
    tolerance,
)

Role = Literal["student", "teacher"]
ROLES: tuple[Role, Role] = ("student", "teacher")


def pooled_tap(role: Role, features: Features, context: LossContext) -> str | None:
    """Finds the map that the classifier of a network averages, and adds its tap to the network.

    The averages of this map over all positions, put through the classifier, are the logits. The
    last map of the features is used if it has this property. Otherwise, the network is searched,
    unless the term's taps select another map.

    Args:
        role: Which of the two networks.
        features: Its features.
        context: Both networks, sample images, and the taps of the term.

    Returns:
        The tap, for :func:`read_map`; None for the last map.

    Raises:
        ValueError: If the network has no maps, none of its maps has this property, or the term's
            taps select a map without it.
    """
    last, network = deepest(features, role), _network(role, context)
    check_classifier(role, features, context, centered=True)
    error = _average_error(last, features)
    if error <= tolerance(last.dtype) and last.any():  # maps of black images may be zero
        return None
    place = pooled_map(_asked(role, context), context.sample)
    if place is not None and getattr(context.taps, role).maps is None:
        network.also([place.tap])
        return place.tap
    measured = f"differ from the input of its classifier by {error:.0%}"
    if error == math.inf:
        width = features.embedding.shape[1]
        measured = f"are {last.shape[1]} numbers, and the input of its classifier {width}"
    advice = (
        "no module computes a map whose averages are this input, which the loss needs; use a loss "
        "that does not, such as at"
        if place is None
        else f"select {place.tap} with the term's taps.{role}.maps, or none"
    )
    raise ValueError(
        f"the averages of the {role}'s last map {measured} ({_name(network)}); {advice}"
    )


def pooled_taps(
    student: Features, teacher: Features, context: LossContext
) -> tuple[str | None, str | None]:
    """Returns the :func:`pooled_tap` of the student and that of the teacher."""
    return pooled_tap("student", student, context), pooled_tap("teacher", teacher, context)


def read_map(features: Features, tap: str | None) -> Tensor:
    """Reads the map at a tap that :func:`pooled_tap` has found."""
    return features.maps[-1] if tap is None else features.others[tap]


def check_classifier(
    role: Role, features: Features, context: LossContext, *, centered: bool = False
) -> None:
    """Checks that the classifier of a network computes its logits from its embedding.

    Args:
        role: Which of the two networks.
        features: Its features.
        context: Both networks.
        centered: Whether a constant per image is ignored, as log-softmax subtracts it.

    Raises:
        ValueError: If it does not: something follows the classifier, or the term's taps select
            another embedding.
    """
    network = _network(role, context)
    error = logits_error(network, features.embedding, features, centered=centered)
    if not error <= tolerance(features.logits.dtype):
        raise ValueError(
            f"the logits that the {role}'s classifier computes from its embedding "
            f"{_measured(error)} ({_name(network)}); the embedding must be the input of the "
            "classifier, and the network must return the output of the classifier"
        )


def check_reused(student: Features, teacher: Features, context: LossContext) -> None:
    """Checks that the classifier of a student is that of its teacher.

    Raises:
        ValueError: If the student's classifier computes other logits from the teacher's embedding.
    """
    error = logits_error(context.student, teacher.embedding, teacher)
    if not error <= tolerance(teacher.logits.dtype):
        raise ValueError(
            "the student's classifier is not that of this teacher: the logits that it computes "
            f"from the teacher's embedding {_measured(error)}; build the student with this teacher"
        )


def check_preactivations(
    pairs: Sequence[tuple[Tensor, Tensor]], context: LossContext, skip: int
) -> None:
    """Checks that pre-activations are those of ReLUs.

    Those of the teacher must be inputs of ReLUs, because their signs tell where it is active. Those
    of the student must be inputs of ReLUs or have negative values: published results include
    students without a ReLU after a block, such as MobileNetV2.

    Args:
        pairs: Pre-activations of the student and of the teacher, without the skipped ones.
        context: Both networks, sample images, and the taps of the term.
        skip: Number of pre-activations skipped before them.

    Raises:
        ValueError: If they are not.
    """
    for role, seen in zip(ROLES, zip(*pairs, strict=True), strict=True):
        view, network = getattr(context.taps, role), _network(role, context)
        read = partial(_preactivations, view=view, skip=skip)
        follow = precede_relu(_asked(role, context), context.sample, read)
        for number, (is_followed, tensor) in enumerate(zip(follow, seen, strict=True), skip):
            if is_followed or (role == "student" and (tensor < 0).any()):
                continue
            has = "has no negative values and " if (tensor >= 0).all() else ""
            raise ValueError(
                f"pre-activation {number} of the {role} {has}is not the input of a ReLU "
                f"({(view.preactivations or network.preactivations)[number]} of {_name(network)}); "
                f"select inputs of ReLUs with the term's taps.{role}.preactivations"
            )


def _preactivations(features: Features, view: View, skip: int) -> list[Tensor]:
    return select(features, view).preactivations[skip:]


def _average_error(last: Tensor, features: Features) -> float:
    """Returns the relative error of the averages of a map as an embedding."""
    average = last.mean((2, 3))
    if average.shape != features.embedding.shape:
        return math.inf
    return relative_error(average, features.embedding)


def _measured(error: float) -> str:
    if error == math.inf:
        return "do not exist: it expects another number of channels"
    return f"are wrong by {error:.0%}"


def _asked(role: Role, context: LossContext) -> FeatureExtractor | Teacher:
    if role == "student":
        return context.student
    assert context.teacher is not None
    return context.teacher


def _network(role: Role, context: LossContext) -> FeatureExtractor:
    asked = _asked(role, context)
    return asked.network if isinstance(asked, Teacher) else asked


def _name(network: FeatureExtractor) -> str:
    return type(network.network).__name__
