"""Builds the data and the networks of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from topkd._runtime import processes
from topkd.config.recipe import Recipe
from topkd.config.sections import DataSection, StudentSection, TeacherSection
from topkd.config.validation import RecipeError, parse_options
from topkd.data import DATA, Augmentation, Data, refuse_few, with_augmentation
from topkd.features import FeatureExtractor
from topkd.losses.base import Loss
from topkd.models import factory


@dataclass(frozen=True)
class Objects:
    """Python objects in place of names in a recipe."""

    data: Data | None = None
    student: Callable[[], nn.Module] | None = None
    """Creates a new student."""
    teacher: nn.Module | None = None
    losses: Mapping[str, Loss] = field(default_factory=dict)
    """Title of a term -> configured loss; every run uses a copy."""


NO_OBJECTS = Objects()


def network_of(section: StudentSection, data: Data, size: int | None = None) -> FeatureExtractor:
    """Builds a network for a data set; ``size`` overrides the image size.

    Raises:
        ValueError: If the network is unknown or does not accept images of this size.
    """
    shown = side(data) if size is None else size
    with locating_size_errors(section.model, shown):
        network = factory.build(
            section.model, len(data.classes), shown, pretrained=section.pretrained, **section.taps
        )
        evaluate_once(network, shown, section.model, data)
    return network


@contextmanager
def locating_size_errors(model: str, size: int) -> Iterator[None]:
    """Adds network and image size to errors of a network that does not accept the size."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # raised by torch or by third-party networks
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{model} does not accept images of {size} px: {reason}") from error


def evaluate_once(network: FeatureExtractor, size: int, model: str, data: Data) -> None:
    """Evaluates a network on a black image.

    Raises:
        RuntimeError: If the network does not accept images of this size.
        ValueError: If the number of logits differs from the number of classes.
    """
    training = network.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        output = network.eval().network(torch.zeros(1, 3, size, size))
    network.train(training)
    logits = output[0] if isinstance(output, tuple) else output
    if isinstance(logits, Tensor) and logits.shape != (1, len(data.classes)):
        width = " x ".join(map(str, logits.shape[1:]))
        raise ValueError(
            f"{model} returns {width} logits, {data.name} has {len(data.classes)} classes"
        )


def published_for(section: TeacherSection, data: Data) -> factory.Published:
    """Returns the metadata of a pretrained teacher's weights.

    Raises:
        RecipeError: If their classes or image size do not match the data.
    """
    published = factory.published(section.model)
    if published.classes != len(data.classes):
        raise RecipeError(
            f"teacher.pretrained: {section.model} has {published.classes} classes, "
            f"{data.name} has {len(data.classes)}; train it on them and set teacher.checkpoint"
        )
    if section.size is None and published.size != side(data):
        raise RecipeError(
            f"teacher.size: {section.model} was trained on images of {published.size} px, "
            f"{data.name} has {side(data)}; set teacher.size, e.g. to {published.size}"
        )
    return published


def side(data: Data) -> int:
    """Returns the image size in pixels."""
    return data.test.read(torch.arange(1), None).shape[-1]


def refuse_large_batches(recipe: Recipe, data: Data) -> None:
    """Raises ``ValueError`` if a batch of all processes has more images than the training set."""
    refuse_few(len(data.train.target), recipe.batch_size * processes.count())


def load_source(section: DataSection) -> Data:
    """Loads the complete data set of a section, without augmentation settings.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a file or an image cannot be read, or a label is out of range.
    """
    data: Data = DATA[section.name](**parse_options(DATA[section.name], section.options, "data"))
    return data


def load_data(section: DataSection, given: Data | None = None) -> Data:
    """Loads the images of a recipe.

    Args:
        section: The recipe's ``data``.
        given: Data in place of the named data set; the other settings still apply.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a file or an image cannot be read, or a label is out of range.
    """
    data = load_source(section) if given is None else given
    if section.validation:
        data = data.with_validation(section.validation)
    if section.fraction < 1:
        data = data.with_fraction(section.fraction)
    if section.limit is not None:
        data = data.with_limit(section.limit)
    if section.test_limit is not None:
        data = data.with_test_limit(section.test_limit)
    changes = section.randaugment
    randaugment = None if changes is None else (changes.operations, changes.magnitude)
    augmentation = Augmentation(randaugment, section.mixup, section.cutmix, section.views)
    workers = None if section.workers == "auto" else section.workers
    return with_augmentation(data, augmentation, workers)
