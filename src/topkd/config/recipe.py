"""Recipes: the YAML schema of an experiment, with strict validation and overrides."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, model_validator

from topkd.config.validation import (
    RecipeError,
    Section,
    change_by,
    near,
    read_yaml,
    validated,
    write_yaml,
)

IMPLIED = "ce"  # loss that the name of a run leaves out beside others


class _Open(Section):
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


class DataSection(_Open):
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


class View(Section):
    """Taps of one network for one term. They replace the network's default taps."""

    maps: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    preactivations: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    embedding: str | None = None
    """Tap of the embedding; a feature map is average-pooled per channel."""


class Taps(Section):
    """Taps of both networks for one term."""

    student: View = View()
    teacher: View = View()


def _moment(value: float) -> float:
    if 0 < value < 1:
        return value
    if value < 1 or value != int(value):
        raise ValueError(
            f"must be a whole number of epochs, or a fraction of them in (0, 1), got {value:g}"
        )
    return int(value)


# Whole numbers are stored as such, so that files and hashes of recipes do not change.
Moment = Annotated[float, AfterValidator(_moment), PlainSerializer(_moment, return_type=Any)]
"""An epoch, counted from 1, or a fraction of all epochs."""


class Term(_Open):
    """One term of the objective; other keys are options of the named loss."""

    name: str
    """Name of the loss."""
    label: str | None = None
    """Title in results. Defaults to the name. Two terms with the same loss need labels."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the term."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Replaces the weight: target fraction of the sum of the gradient norms of all terms, measured
    at the student's embedding or, if a term reads other features, at the backbone weights."""
    start: Moment = 1
    """First epoch in which the term is active, or the fraction of the epochs that precedes it."""
    stop: Moment | None = None
    """Last epoch in which the term is active, or the fraction of the epochs that it ends."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Number of epochs, from ``start``, in which the weight increases linearly from 0."""
    decay: Annotated[int, Field(ge=0)] = 0
    """Number of epochs, up to ``stop``, in which the weight decreases linearly to 0."""
    batch: Literal["local", "gathered"] = "local"
    """With several processes: compute the loss per process, or on the batches of all."""
    taps: Taps = Taps()

    @model_validator(mode="after")
    def _weighs_in_one_way(self) -> Term:
        if self.share is not None and "weight" in self.model_fields_set and self.weight != 1:
            raise ValueError("share replaces weight; set only one of them")
        are_alike = self.stop is not None and (self.stop < 1) == (self.start < 1)
        if self.stop is not None and are_alike and self.stop < self.start:
            raise ValueError(f"stop ({self.stop}) is before start ({self.start})")
        return self

    @property
    def title(self) -> str:
        """Title of the term in results."""
        return self.label or self.name

    def span(self, epochs: int) -> tuple[int, int]:
        """Returns the first and the last epoch in which the term is active.

        A fraction is rounded to whole epochs, with at least one epoch before and after it. The
        first epoch is after the last if the term is never active.

        Examples:
            >>> Term(name="fsp", stop=0.125).span(240), Term(name="ce", start=0.125).span(240)
            ((1, 30), (31, 240))
        """

        def whole(moment: float, after: int) -> int:
            if moment >= 1:
                return int(moment)
            return max(1, min(math.floor(moment * epochs + 0.5), epochs - 1)) + after

        last = epochs if self.stop is None else min(whole(self.stop, after=0), epochs)
        return whole(self.start, after=1), last

    def resolved(self, epochs: int) -> Term:
        """Replaces fractions of the epochs by the epochs that they give."""
        first, last = self.span(epochs)
        update = {"start": first} if self.start < 1 else {}
        if self.stop is not None and self.stop < 1:
            update["stop"] = last
        return self.model_copy(update=update)

    def schedule(self, epoch: int, epochs: int) -> float:
        """Returns the factor of the weight in an epoch, counted from 1.

        Examples:
            >>> term = Term(name="kd", start=2, stop=5, warmup=2, decay=2)
            >>> [term.schedule(epoch, epochs=6) for epoch in range(1, 7)]
            [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
        """
        first, last = self.span(epochs)
        if not first <= epoch <= last:
            return 0.0
        rise = (epoch - first + 1) / max(1, self.warmup)
        fall = (last - epoch + 1) / max(1, self.decay)
        return min(1.0, rise, fall)

    def turns(self, epochs: int) -> set[int]:
        """Returns the epochs of a run in which the slope of the schedule may change."""
        first, last = self.span(epochs)
        rise, fall = max(1, self.warmup), max(1, self.decay)
        meeting = ((last + 1) * rise + (first - 1) * fall) // (rise + fall)
        turns = {first, first + rise, last, last - fall, meeting}
        near = {turn + step for turn in turns for step in (-1, 0, 1)}
        return {epoch for epoch in near if 1 <= epoch <= epochs}

    def check_schedule(self, epochs: int) -> None:
        """Checks that the term is active in a run of so many epochs.

        Raises:
            ValueError: If it is never active.
        """
        first, last = self.span(epochs)
        if first > last:
            given = self.model_dump(include={"start", "stop"}, exclude_defaults=True)
            limits = ", ".join(f"{key} {value}" for key, value in given.items())
            raise ValueError(
                f"{self.title} is never active in {epochs} epochs ({limits}); "
                "use a fraction of the epochs, or more epochs"
            )

    def schedule_warning(self, epochs: int) -> str:
        """Describes a warm-up or decay that never lets the term reach its weight, if any."""
        first, last = self.span(epochs)
        peak = max(self.schedule(epoch, epochs) for epoch in self.turns(epochs))
        if peak == 1:
            return ""
        given = self.model_dump(include={"warmup", "decay"}, exclude_defaults=True)
        limits = " and ".join(f"{key} {value}" for key, value in given.items())
        return (
            f"{self.title} reaches {peak:.0%} of its weight: {limits} does not fit into its "
            f"epochs, {first} to {last}"
        )


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


class Recipe(Section):
    """All settings that affect the result of a run, except its seed."""

    name: str = ""
    data: DataSection
    teacher: TeacherSection | None = None
    student: StudentSection
    losses: Annotated[tuple[Term, ...], Field(min_length=1)]
    controls: Mapping[str, Annotated[tuple[Term, ...], Field(min_length=1)]] = {}
    """Name -> losses of a control run. The first one is the baseline of comparisons."""
    epochs: Annotated[int, Field(gt=0)] = 240
    evaluate_every: Annotated[int, Field(gt=0)] = 1
    """Number of epochs between evaluations; the last epoch is always evaluated."""
    evaluation: tuple[str, ...] = ()
    """Additional metrics of the finished student, such as ``knn``, and ``per_class``."""
    batch_size: Annotated[int, Field(gt=1)] = 64
    optimizer: Optimizer = Optimizer()
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Maximum gradient norm."""
    sync_batchnorm: bool = False
    """With several processes: whether to synchronize the student's batch normalization."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """CPU threads. Defaults to all; small networks are often fastest with one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype of the networks; auto selects bfloat16 if the device supports it."""
    compile: Literal["auto", True, False] = "auto"
    """Whether to compile the networks; auto compiles for long runs on a GPU."""

    @model_validator(mode="after")
    def _name_is_a_folder(self) -> Recipe:
        if self.name and not re.fullmatch(r"\w[\w .+-]*(/\w[\w .+-]*)*", self.name):
            raise ValueError(
                f"name: {self.name!r} cannot name a folder below --out; use letters, digits, "
                "' ', '.', '+', '-' and '_', with '/' between folders"
            )
        return self

    @model_validator(mode="after")
    def _control_names_are_folders(self) -> Recipe:
        for name in self.controls:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise ValueError(
                    f"controls: {name!r} cannot name a run; use letters, digits, '.', '-' and '_'"
                )
            if name == self.main:
                raise ValueError(
                    f"controls: {name!r} is the name of the runs with `losses`, which are named "
                    "after their terms; rename the control, or label a term"
                )
        return self

    @model_validator(mode="after")
    def _terms_leave_no_gap(self) -> Recipe:
        for name, terms in self.variants.items():
            variant = self.place(name)
            titles = [term.title for term in terms]
            doubled = sorted({title for title in titles if titles.count(title) > 1})
            if doubled:
                raise ValueError(
                    f"{variant}: {', '.join(doubled)} appears twice; give a label to each"
                )
            if sum(term.share or 0 for term in terms) >= 1 or all(term.share for term in terms):
                raise ValueError(
                    f"{variant}: the sum of shares must be below 1, and a term needs a weight"
                )
            for number, term in enumerate(terms):
                try:
                    term.check_schedule(self.epochs)
                except ValueError as error:
                    raise ValueError(f"{variant}[{number}]: {error}") from error
            spans = [term.span(self.epochs) for term in terms]
            changes = {1, *(first for first, _ in spans), *(last + 1 for _, last in spans)}
            for epoch in sorted(epoch for epoch in changes if epoch <= self.epochs):
                if not any(t.weight * t.schedule(epoch, self.epochs) for t in terms if not t.share):
                    raise ValueError(f"{variant}: no term with a weight is active in epoch {epoch}")
        return self

    @property
    def variants(self) -> dict[str, tuple[Term, ...]]:
        """Variant -> terms: the controls, then the recipe's losses."""
        return {**self.controls, self.main: self.losses}

    @property
    def main(self) -> str:
        """Name of the variant that is trained with ``losses``, e.g. ``kd+topkd``."""
        return variant_name(self.losses)

    def place(self, variant: str) -> str:
        """Returns the key of a variant's terms: ``losses`` or ``controls.NAME``."""
        return "losses" if variant == self.main else f"controls.{variant}"

    def schedule_warnings(self, variant: str) -> list[str]:
        """Lists the terms of a variant whose schedule does not reach their weight, one line each.

        Examples:
            >>> recipe = load("digits", ["losses.kd.warmup=90", "epochs=9"])
            >>> recipe.schedule_warnings(recipe.main)[0].partition(":")[0]
            'losses[1]'
        """
        return [
            f"{self.place(variant)}[{number}]: {warning}"
            for number, term in enumerate(self.variants[variant])
            if (warning := term.schedule_warning(self.epochs))
        ]

    @property
    def hash(self) -> str:
        """Hash of all settings except the name, 12 hexadecimal digits.

        A start or stop that is a fraction of the epochs has the hash of the epoch that it gives.

        Settings at their default are excluded, so a key added by a later version does not change
        the hashes of existing recipes. The default of a setting must therefore never change.

        If ``teacher.recipe`` is a file, its name counts without the folder, so that the hash does
        not depend on the working directory. Before a run is reused, its content is compared.
        """
        update = {
            "losses": tuple(term.resolved(self.epochs) for term in self.losses),
            "controls": {
                name: tuple(term.resolved(self.epochs) for term in terms)
                for name, terms in self.controls.items()
            },
        }
        recipe = self.model_copy(update=update)
        tree = recipe.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
        content = _without_folder(tree)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def variant_name(losses: Sequence[Term]) -> str:
    """Names runs after their losses; cross-entropy is left out beside other losses.

    Examples:
        >>> variant_name([Term(name="ce"), Term(name="kd"), Term(name="topkd")])
        'kd+topkd'
    """
    titles = [term.title for term in losses if term.title != IMPLIED] or [IMPLIED]
    return re.sub(r"[^\w.+-]+", "-", "+".join(titles))[:100]


def names() -> list[str]:
    """Lists the recipes that ship with the package."""
    top = resources.files("topkd") / "recipes"
    with resources.as_file(top) as folder:
        return sorted(
            p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")
        )


def text(name: str) -> str:
    """Returns the YAML of a recipe, including comments: a file, or one of :func:`names`.

    Raises:
        RecipeError: If the recipe does not exist, or the file is not UTF-8.
    """
    if Path(name).is_file():
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name} is not UTF-8: {error}") from error
    if name in names():
        return (resources.files("topkd") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    if Path(name).suffix in (".yaml", ".yml"):
        raise RecipeError(f"there is no file {name}")
    raise RecipeError(
        f"there is no recipe {name!r}{near(name, names(), '; `topkd list recipes` lists them')}"
    )


def about(name: str) -> str:
    """Returns the first line of a recipe's leading comment."""
    first = text(name).splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def load(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Loads a recipe and applies changes.

    Args:
        name: A file, or one of :func:`names`.
        changes: Changes ``key=value``, with a dotted key (``optimizer.lr=0.1``,
            ``losses.kd.weight=2``) and a value in YAML.

    Raises:
        RecipeError: If the recipe or a change is invalid.
    """
    tree = read_yaml(text(name), name)
    if not isinstance(tree, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values")
    default = Path(name).stem if Path(name).is_file() else name
    tree.setdefault("name", default)
    for change in changes:
        change_by(tree, change)
    _find_beside(tree, Path(name))
    return parse(tree)


def _find_beside(tree: dict[str, Any], file: Path) -> None:
    """Resolves ``teacher.recipe`` relative to the folder of the recipe."""
    teacher = tree.get("teacher")
    name = teacher.get("recipe") if isinstance(teacher, dict) else None
    if isinstance(name, str) and file.is_file() and (file.parent / name).is_file():
        tree["teacher"] = {**tree["teacher"], "recipe": str(file.parent / name)}


def parse(tree: Mapping[str, Any]) -> Recipe:
    """Validates plain values and returns a recipe.

    Raises:
        RecipeError: If a key or a value is invalid; the message lists all of them.
    """
    return validated(Recipe, tree, "recipe")


def write(recipe: Recipe) -> str:
    """Writes a recipe as YAML; reading it returns an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def difference(there: Recipe, here: Recipe) -> str:
    """Describes the first key that differs between two recipes, with both values."""

    def leaf(key: str, a: Any, b: Any) -> str | None:
        if a == b:
            return None
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            a, b = dict(enumerate(a)), dict(enumerate(b))
        if isinstance(a, dict) and isinstance(b, dict):
            inner = (leaf(f"{key}.{k}", a.get(k), b.get(k)) for k in dict.fromkeys((*a, *b)))
            return next(found for found in inner if found is not None)
        return f"{key.removeprefix('.')}: {_shown(a)} there, {_shown(b)} here"

    exclude = {"name"}
    trees = (recipe.model_dump(mode="json", exclude=exclude) for recipe in (there, here))
    return leaf("", *map(_without_folder, trees)) or "no difference"


def _without_folder(tree: dict[str, Any]) -> dict[str, Any]:
    """Removes the folder from ``teacher.recipe`` if it is the path of a file."""
    teacher = tree.get("teacher") or {}
    path = Path(teacher.get("recipe") or "")
    if path.suffix not in (".yaml", ".yml"):
        return tree
    return tree | {"teacher": teacher | {"recipe": path.name}}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
