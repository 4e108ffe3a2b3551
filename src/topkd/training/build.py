"""What the sections of a recipe stand for: images, and networks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from topkd._runtime import processes
from topkd.config.recipe import DataSection, Recipe, StudentSection, TeacherSection
from topkd.config.validation import RecipeError, parse_options
from topkd.data import DATA, Augmentation, Data, refuse_few, with_augmentation
from topkd.features import FeatureExtractor
from topkd.losses.base import Loss
from topkd.models import factory


@dataclass(frozen=True)
class Objects:
    """Python objects that stand in for names in a recipe."""

    data: Data | None = None
    student: Callable[[int], nn.Module] | None = None
    """Number of classes -> a new student."""
    teacher: nn.Module | None = None
    losses: Mapping[str, Loss] = field(default_factory=dict)
    """Title of a term -> its loss, configured; every run binds a copy."""


NO_OBJECTS = Objects()


def network_of(section: StudentSection, data: Data, size: int | None = None) -> FeatureExtractor:
    """Builds a network for the images of a data set, or for those of another size.

    Raises:
        ValueError: If the network is unknown, or cannot take images of this size.
    """
    shown = side(data) if size is None else size
    with taking(section.model, shown):
        network = factory.build(
            section.model, len(data.classes), shown, pretrained=section.pretrained, **section.taps
        )
        evaluate_once(network, shown, section.model, data)
    return network


@contextmanager
def taking(model: str, size: int) -> Iterator[None]:
    """Names network and size in an error of a network that cannot take images of this size."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # torch's, and those of networks of others
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{model} cannot take images of {size} px: {reason}") from error


def evaluate_once(network: FeatureExtractor, size: int, model: str, data: Data) -> None:
    """Evaluates a network on a black image.

    Raises:
        RuntimeError: If it cannot take images of this size.
        ValueError: If it answers with another number of logits than there are classes.
    """
    training = network.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        answer = network.eval().network(torch.zeros(1, 3, size, size))
    network.train(training)
    logits = answer[0] if isinstance(answer, tuple) else answer
    if isinstance(logits, Tensor) and logits.shape != (1, len(data.classes)):
        width = " x ".join(map(str, logits.shape[1:]))
        raise ValueError(
            f"{model} answers with {width} logits, {data.name} has {len(data.classes)} classes"
        )


def published_for(section: TeacherSection, data: Data) -> factory.Published:
    """What is known of the weights of a teacher that nobody here trains."""
    told = factory.published(section.model)
    if told.classes != len(data.classes):
        raise RecipeError(
            f"teacher.pretrained: {section.model} tells {told.classes} classes apart, "
            f"{data.name} has {len(data.classes)}; train it on them, and give the checkpoint"
        )
    if section.size is None and told.size != side(data):
        raise RecipeError(
            f"teacher.size: {section.model} was trained on images of {told.size} px, {data.name} "
            f"has {side(data)}; say which size it shall see, such as {told.size}"
        )
    return told


def side(data: Data) -> int:
    """Pixels on a side of what networks are shown."""
    return data.test.read(torch.arange(1), None).shape[-1]


def refuse_large_batches(recipe: Recipe, data: Data) -> None:
    """Raises ``ValueError`` if a batch of all processes has more images than the training set."""
    refuse_few(len(data.train.target), recipe.batch_size * processes.count())


def load_source(section: DataSection) -> Data:
    """Loads the source that a section names, complete and without augmentation settings.

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
        given: Data in place of the source that the section names; its own options still apply.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a file or an image cannot be read, or a label is out of range.
    """
    data = load_source(section) if given is None else given
    if section.validation:
        data = data.with_validation(section.validation)
    if section.limit is not None:
        data = data.with_limit(section.limit)
    changes = section.randaugment
    randaugment = None if changes is None else (changes.operations, changes.magnitude)
    augmentation = Augmentation(randaugment, section.mixup, section.cutmix, section.views)
    workers = None if section.workers == "auto" else section.workers
    return with_augmentation(data, augmentation, workers)
