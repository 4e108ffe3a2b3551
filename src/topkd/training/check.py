"""Recipes checked against what there is, before any work is done."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from topkd.config import recipe as recipes
from topkd.config.recipe import STUDENT, Recipe, StudentSection, Term, View
from topkd.config.validation import RecipeError, near, parse_options
from topkd.data import DATA, TRAINING_IMAGES, refuse_few
from topkd.losses import LOSSES, Loss
from topkd.models import factory
from topkd.training.build import NO_OBJECTS, Objects


def check(recipe: Recipe, objects: Objects = NO_OBJECTS) -> None:
    """Checks every name and option of a recipe before any work is done.

    Args:
        recipe: The recipe.
        objects: Objects that stand in for names, which are then not looked up.

    Raises:
        RecipeError: If one is wrong; the message says where, what was got and what would be right.
    """
    if objects.data is None:
        named(DATA, recipe.data.name, "data.name")
        parse_options(DATA[recipe.data.name], recipe.data.options, "data")
    if objects.student is None:
        _check_network(recipe.student, "student")
    for variant, terms in recipe.variants.items():
        place = "losses" if variant == STUDENT else f"controls.{variant}"
        for number, term in enumerate(terms):
            _check_term(term, f"{place}[{number}]", recipe, objects.losses.get(term.title))
    if recipe.teacher is None and recipe.student.classifier == "teacher":
        raise RecipeError("student.classifier: there is no teacher to take it from")
    if recipe.teacher is not None:
        if recipe.teacher.cache and (
            recipe.data.views == 2 or recipe.data.mixup or recipe.data.cutmix
        ):
            raise RecipeError(
                "teacher.cache: answers are kept image by image, which mixed images and two views "
                "are not; leave out data.mixup, data.cutmix and data.views, or the cache"
            )
        if objects.teacher is None:
            _check_network(recipe.teacher, "teacher")
        if recipe.teacher.checkpoint is None and not recipe.teacher.pretrained:
            teacher_recipe(recipe)


def check_batches(recipe: Recipe) -> None:
    """Raises ``ValueError`` if the training images, as far as they are known, fill no batch."""
    for count in (recipe.data.limit, TRAINING_IMAGES.get(recipe.data.name)):
        if count is not None:
            refuse_few(count, recipe.batch_size)


def _check_network(section: StudentSection, where: str) -> None:
    with torch.random.fork_rng(devices=[]), told(where):
        with told("model"):
            factory.find(section.model)
        if section.pretrained:
            factory.published(section.model)
        if section.taps:
            factory.build(section.model, 2, **section.taps)  # finds names that are not there


def found_taps(recipe: Recipe) -> list[str]:
    """Says where networks are read of which that is not known, a line each.

    Raises:
        RecipeError: If it cannot be found, or a network cannot take the images.
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
        with torch.random.fork_rng(devices=[]), told(role):
            try:
                network = factory.build(section.model, 2, size, **section.taps)
            except (RuntimeError, AssertionError) as error:  # of torch, and of transformers
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"cannot take images of {size} px: {reason}") from error
        if network.found:
            lines.append(f"{network.found}; {role}.head and {role}.maps overrule it")
    return lines


def pixels(recipe: Recipe) -> int | None:
    """Pixels on a side of the images, as far as a recipe tells."""
    takes = inspect.signature(DATA[recipe.data.name]).parameters
    told = recipe.data.options.get("size", takes["size"].default if "size" in takes else None)
    return told if isinstance(told, int) else None


@contextmanager
def told(where: str) -> Iterator[None]:
    """Says in an error where in the recipe it comes from."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{where}.{error}") from error
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_term(term: Term, where: str, recipe: Recipe, given: Loss | None) -> None:
    if given is None:
        named(LOSSES, term.name, f"{where}.name")
    loss = given or LOSSES[term.name]
    if loss.needs_teacher and recipe.teacher is None:
        raise RecipeError(f"{where}: {term.name} cannot be computed without a teacher")
    if given is None:
        configured(term, where)
    cached = recipe.teacher is not None and recipe.teacher.cache
    if cached and (loss.reads_maps or term.taps.teacher != View()):
        raise RecipeError(
            f"{where}: {term.title} reads more of the teacher than the logits and embeddings that "
            "teacher.cache keeps"
        )
    if loss.replaces_classifier and recipe.student.classifier != "teacher":
        raise RecipeError(f"{where}: {term.name} needs student.classifier=teacher")


def configured(term: Term, where: str) -> Loss:
    """Constructs the loss of a term, which validates its options.

    Args:
        term: Of a recipe.
        where: Its place in the recipe, for messages.

    Raises:
        RecipeError: If an option is unknown or invalid.
    """
    loss = LOSSES[term.name]
    options = parse_options(loss.__init__, term.options, where, siblings=[*Term.model_fields])
    try:
        return loss(**options)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def named(catalog: Mapping[str, Any], name: str, where: str) -> None:
    """Makes sure that a catalog has a name.

    Raises:
        RecipeError: If it has not; the message tells the nearest one.
    """
    if name not in catalog:
        raise RecipeError(f"{where}: there is no {name!r}{near(name, list(catalog))}")


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe that trains the teacher, on the student's images."""
    section = recipe.teacher
    assert section is not None
    assert section.recipe is not None
    teacher = recipes.load(section.recipe).model_copy(update={"data": recipe.data})
    if teacher.student.model != section.model:
        raise RecipeError(
            f"teacher.recipe: {teacher.name} trains {teacher.student.model}, "
            f"teacher.model is {section.model}"
        )
    return teacher
