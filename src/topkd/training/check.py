"""Validation of the names and options in a recipe before training."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from topkd.config import recipe as recipes
from topkd.config.recipe import Recipe
from topkd.config.sections import StudentSection
from topkd.config.terms import Term, View
from topkd.config.validation import RecipeError, near, parse_options
from topkd.data import DATA, TRAINING_IMAGES, refuse_few
from topkd.evaluation.metrics import METRICS
from topkd.evaluation.per_class import PER_CLASS
from topkd.losses import LOSSES, Loss
from topkd.models import factory
from topkd.training.build import NO_OBJECTS, Objects


def check(recipe: Recipe, objects: Objects = NO_OBJECTS) -> None:
    """Checks every name and option of a recipe.

    Args:
        recipe: The recipe.
        objects: Objects in place of names, which are then not looked up.

    Raises:
        RecipeError: If a name or an option is invalid; the message gives the key, the value and
            valid values.
    """
    if objects.data is None:
        check_name(DATA, recipe.data.name, "data.name")
        parse_options(DATA[recipe.data.name], recipe.data.options, "data")
    if objects.student is None:
        _check_network(recipe.student, "student")
    for variant, terms in recipe.variants.items():
        for number, term in enumerate(terms):
            where, given = f"{recipe.place(variant)}[{number}]", objects.losses.get(term.title)
            _check_term(term, where, recipe, given)
    for number, name in enumerate(recipe.evaluation):
        check_metric(name, f"evaluation[{number}]", has_teacher=recipe.teacher is not None)
    if recipe.teacher is None and recipe.student.classifier == "teacher":
        raise RecipeError("student.classifier: reusing the teacher's classifier needs a teacher")
    if recipe.teacher is not None:
        if recipe.teacher.cache and (
            recipe.data.views == 2 or recipe.data.mixup or recipe.data.cutmix
        ):
            raise RecipeError(
                "teacher.cache: the cache stores features per image, which excludes mixed images "
                "and two views; disable data.mixup, data.cutmix and data.views=2, or the cache"
            )
        if objects.teacher is None:
            _check_network(recipe.teacher, "teacher")
        if recipe.teacher.checkpoint is None and not recipe.teacher.pretrained:
            teacher_recipe(recipe)


def check_batches(recipe: Recipe) -> None:
    """Raises ``ValueError`` if the training set is known to be smaller than a batch."""
    for count in (recipe.data.limit, TRAINING_IMAGES.get(recipe.data.name)):
        if count is not None:
            refuse_few(count, recipe.batch_size)


def _check_network(section: StudentSection, where: str) -> None:
    with torch.random.fork_rng(devices=[]), locating_errors(where):
        with locating_errors("model"):
            factory.find(section.model)
        if section.pretrained:
            factory.published(section.model)
        if section.taps:
            factory.build(section.model, 2, **section.taps)  # detects unknown modules


def found_taps(recipe: Recipe) -> list[str]:
    """Describes the automatically detected taps of user networks, one line per network.

    Raises:
        RecipeError: If taps cannot be detected, or a network does not accept the images.
    """
    sections: dict[str, StudentSection | None] = {
        "student": recipe.student,
        "teacher": recipe.teacher,
    }
    lines = []
    for role, section in sections.items():
        if section is None or not factory.is_own(section.model):
            continue
        size = getattr(section, "size", None) or pixels(recipe)
        with torch.random.fork_rng(devices=[]), locating_errors(role):
            try:
                network = factory.build(section.model, 2, size, **section.taps)
            except (
                RuntimeError,
                AssertionError,
            ) as error:  # raised by torch, and by vision transformers
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"does not accept images of {size} px: {reason}") from error
        if network.found:
            lines.append(f"{network.found}; {role}.head and {role}.maps override it")
    return lines


def pixels(recipe: Recipe) -> int | None:
    """Returns the image size in pixels; None if the recipe does not determine it."""
    takes = inspect.signature(DATA[recipe.data.name]).parameters
    size = recipe.data.options.get("size", takes["size"].default if "size" in takes else None)
    return size if isinstance(size, int) else None


@contextmanager
def locating_errors(where: str) -> Iterator[None]:
    """Adds a location in the recipe to error messages."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{where}.{error}") from error
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_term(term: Term, where: str, recipe: Recipe, given: Loss | None) -> None:
    if given is None:
        check_name(LOSSES, term.name, f"{where}.name")
    loss = given or LOSSES[term.name]
    if loss.needs_teacher and recipe.teacher is None:
        raise RecipeError(f"{where}: {term.name} cannot be computed without a teacher")
    if given is None:
        configured(term, where)
    cached = recipe.teacher is not None and recipe.teacher.cache
    if cached and (loss.reads_maps or term.taps.teacher != View()):
        raise RecipeError(
            f"{where}: {term.title} reads feature maps or taps of the teacher, but teacher.cache "
            "stores only logits and embeddings"
        )
    if loss.replaces_classifier and recipe.student.classifier != "teacher":
        raise RecipeError(f"{where}: {term.name} needs student.classifier=teacher")


def configured(term: Term, where: str) -> Loss:
    """Constructs the loss of a term, which validates its options.

    Args:
        term: Term of a recipe.
        where: Location in the recipe, for messages.

    Raises:
        RecipeError: If an option is unknown or invalid.
    """
    loss = LOSSES[term.name]
    options = parse_options(loss.__init__, term.options, where, siblings=[*Term.model_fields])
    try:
        return loss(**options)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def check_name(catalog: Mapping[str, Any], name: str, where: str) -> None:
    """Checks that a catalog has a name.

    Raises:
        RecipeError: If the name is unknown; the message suggests the closest one.
    """
    if name not in catalog:
        raise RecipeError(f"{where}: there is no {name!r}{near(name, list(catalog))}")


def check_metric(name: str, where: str, *, has_teacher: bool) -> None:
    """Checks that a metric, or ``per_class``, can be computed.

    Raises:
        RecipeError: If the name is unknown, or the metric needs a teacher and there is none.
    """
    check_name(dict.fromkeys((*METRICS, PER_CLASS)), name, where)
    if name in METRICS and METRICS[name].needs_teacher and not has_teacher:
        raise RecipeError(f"{where}: {name} cannot be computed without a teacher")


def teacher_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe that trains the teacher, with the data of the student's recipe.

    Its name lists the settings of the data that differ from those of the teacher's own recipe, as
    ``digits/teacher-limit-300``, and ends with a hash if text or flags differ, so that students on
    different data do not share a teacher.
    """
    section = recipe.teacher
    assert section is not None
    assert section.recipe is not None
    loaded = recipes.load(section.recipe)
    name = "-".join([loaded.name, *recipe.data.differences(loaded.data)])
    teacher = loaded.model_copy(update={"data": recipe.data, "name": name})
    if teacher.student.model != section.model:
        raise RecipeError(
            f"teacher.recipe: {teacher.name} trains {teacher.student.model}, "
            f"teacher.model is {section.model}"
        )
    return teacher
