"""Sections of a recipe: data, networks and optimizer."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from topkd.config.validation import Section


class OpenSection(Section):
    """Section with additional keys, which are options of the named object."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """Additional keys of the section."""
        return dict(self.model_extra or {})


class RandAugment(Section):
    """Settings of RandAugment: operations per image and their magnitude."""

    operations: Annotated[int, Field(ge=1)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class DataSection(OpenSection):
    """Data set and augmentation; other keys are options of the data set."""

    name: str
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training images that replaces the test set, for tuning."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Maximum number of training images."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Stratified fraction of the training images that remain after ``validation``."""
    test_limit: Annotated[int, Field(gt=0)] | None = None
    """Maximum number of evaluation images."""
    randaugment: RandAugment | None = None
    """RandAugment of the training images; with two views, of the second view."""
    augmentation_seed: Annotated[int, Field(ge=0)] | None = None
    """Augmentation seed. Defaults to the run's seed."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup's Beta distribution; 0 disables mixup."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of CutMix's Beta distribution; 0 disables CutMix. With both, each batch uses mixup or
    CutMix at random."""
    views: Literal[1, 2] = 1
    """Views per image; the second is strongly augmented (RandAugment and Cutout)."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Processes that load training images; 0 uses threads. Results do not depend on it."""

    def differences(self, other: DataSection) -> list[str]:
        """Lists the settings that differ from another section, as ``limit-300``.

        Text and flags tell where the images are and how to get them. They are listed as a hash, and
        so are keys that only the other section has.
        """
        own, others = (each.model_dump(mode="json", exclude={"workers"}) for each in (self, other))
        differing = {key: own.get(key) for key in own | others if own.get(key) != others.get(key)}
        hashed = {k: v for k, v in differing.items() if k not in own or isinstance(v, str | bool)}
        listed = [f"{key}-{differing[key]}" for key in sorted(differing.keys() - hashed.keys())]
        listed = [re.sub(r"[^\w.]+", "-", each).strip("-") for each in listed]
        if hashed:
            text = json.dumps(hashed, sort_keys=True)
            listed.append(hashlib.sha256(text.encode()).hexdigest()[:8])
        return listed


class StudentSection(Section):
    """The student network."""

    model: str
    """Name of a network: NAME, torchvision:NAME, timm:NAME or MODULE:CALLABLE for user code."""
    maps: tuple[str, ...] | None = None
    """Modules whose outputs are the feature maps, shallow to deep. Defaults to the family's."""
    head: str | None = None
    """Module that maps embeddings to logits. Defaults to the family's."""
    preactivations: tuple[str, ...] | None = None
    """Taps of the maps before their activation. Defaults to the family's."""
    pretrained: bool = False
    """Whether to start from the weights published by torchvision or timm."""

    classifier: Literal["own", "teacher"] = "own"
    """Classifier of a student: its own, or the teacher's behind a projector (SimKD)."""

    @property
    def taps(self) -> dict[str, Any]:
        """Taps that replace those of the family."""
        given = {"maps": self.maps, "head": self.head, "preactivations": self.preactivations}
        return {name: value for name, value in given.items() if value is not None}


class TeacherSection(StudentSection):
    """The teacher network and the source of its weights.

    The weights come from a file (``checkpoint``), a ``recipe`` that trains the teacher, or
    torchvision or timm (``pretrained``).
    """

    checkpoint: str | None = None
    """Weights file."""
    weights: Literal["plain", "ema"] = "plain"
    """Which weights to load from a checkpoint with both: plain, or their moving average."""
    recipe: str | None = None
    """Recipe that trains the teacher."""
    mean: tuple[float, float, float] | None = None
    """Normalization mean of the teacher, if it differs from the student's."""
    std: tuple[float, float, float] | None = None
    """Normalization standard deviation of the teacher, if it differs from the student's."""
    size: Annotated[int, Field(gt=0)] | None = None
    """Input size in pixels, if it differs from the student's; images are resized."""

    cache: bool = False
    """Whether to cache logits and embeddings of every augmented image for later students."""

    @model_validator(mode="after")
    def _has_weights(self) -> TeacherSection:
        if self.classifier != "own":
            raise ValueError("classifier is an option of the student")
        has_source = self.checkpoint is not None or self.recipe is not None
        if not has_source and not self.pretrained:
            raise ValueError(
                "needs a checkpoint (a file) or a recipe that trains it, or pretrained: true"
            )
        if has_source and self.pretrained:
            raise ValueError("pretrained excludes checkpoint and recipe; set only one of them")
        if self.weights == "ema" and self.checkpoint is None:
            raise ValueError("weights: ema needs a checkpoint")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std must be set together")
        return self


class Optimizer(Section):
    """Optimizer and learning rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD, or beta1 of AdamW, whose beta2 is 0.999."""
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["milestones", "cosine", "one-cycle"] = "milestones"
    milestones: tuple[int, ...] = (150, 180, 210)
    """Epochs after which the learning rate is multiplied by ``factor``."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Fraction of a one-cycle schedule in which the learning rate increases."""

    @model_validator(mode="after")
    def _nesterov_is_of_sgd(self) -> Optimizer:
        if self.nesterov and self.name != "sgd":
            raise ValueError("nesterov is an option of sgd")
        return self
