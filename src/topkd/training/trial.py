"""Trial setup of all losses with new networks and noise for images, before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from topkd._io.progress import Progress
from topkd.config.recipe import Recipe
from topkd.config.sections import StudentSection
from topkd.config.validation import RecipeError
from topkd.features import Batch, FeatureExtractor, Features, Teacher
from topkd.losses.base import LossContext, LossTerm, needed_taps
from topkd.models import factory
from topkd.training.check import configured, pixels

CLASSES = 10  # arbitrary: no loss depends on it


class _NeedsDataError(Exception):
    """Raised if the setup of a loss needs the training set."""


def try_losses(recipe: Recipe) -> None:
    """Sets up every loss that needs neither data nor training with both networks.

    This validates options whose limits depend on the networks, such as the number of maps to skip,
    before the teacher is trained. Networks that cannot be built without the data are skipped.

    Args:
        recipe: A recipe that :func:`~topkd.training.check.check` has accepted.

    Raises:
        RecipeError: If a loss cannot compare the networks; the message names the term.
    """
    if recipe.teacher is None or recipe.student.classifier == "teacher":
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        student, teacher_network = (
            _network(recipe.student, recipe),
            _network(recipe.teacher, recipe),
        )
        if student is None or teacher_network is None:
            return
        teacher = Teacher(teacher_network, size=_side(recipe.teacher, recipe))
        for variant, terms in recipe.variants.items():
            for number, term in enumerate(terms):
                where = f"{recipe.place(variant)}[{number}]"
                student.also(needed_taps(term.taps.student))
                teacher_network.also(needed_taps(term.taps.teacher))
                _bind(LossTerm(term, configured(term, where)), where, student, teacher, recipe)


def _network(section: StudentSection, recipe: Recipe) -> FeatureExtractor | None:
    """Builds an untrained network; None if it fails, which is reported later."""
    size = _side(section, recipe)
    try:
        network = factory.build(section.model, CLASSES, size, **section.taps).eval()
        network.network(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError):
        return None
    return network


def _side(section: StudentSection, recipe: Recipe) -> int:
    return getattr(section, "size", None) or pixels(recipe) or 32


def _bind(
    term: LossTerm, where: str, student: FeatureExtractor, teacher: Teacher, recipe: Recipe
) -> None:
    # Noise: features of black images are zero in new networks, which would hide their differences.
    side = _side(recipe.student, recipe)
    noise = torch.randn(2, 3, side, side)
    student_output, teacher_output = student(noise), teacher(noise)
    context = LossContext(
        _no_batches,
        torch.arange(2 * CLASSES) % CLASSES,
        student,
        teacher,
        "trial",
        Path(),
        Progress(quiet=True),
        noise,
    )
    try:
        with torch.enable_grad():
            term.setup(student_output, teacher_output, context)
    except _NeedsDataError:
        pass
    except ValueError as error:
        reason = str(error).removeprefix(f"losses.{term.title}: ")
        raise RecipeError(f"{where}: {reason}") from error


def _no_batches(epoch: int) -> Iterator[tuple[Batch, Features]]:
    raise _NeedsDataError
