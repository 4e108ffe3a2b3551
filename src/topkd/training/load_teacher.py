"""Loads the teacher of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd.config.sections import TeacherSection
from topkd.data import Data, same_order
from topkd.features import FeatureExtractor, Teacher
from topkd.models import checkpoint, factory
from topkd.training.build import network_of, published_for, side


def load_teacher(
    section: TeacherSection,
    data: Data,
    progress: Progress,
    *,
    file: Path | None = None,
    given: nn.Module | None = None,
) -> Teacher:
    """Builds the teacher with published weights, with those of a file, or from a given module.

    Args:
        section: The recipe's ``teacher``.
        data: Data set of the student.
        progress: Shows messages.
        file: Weights file of a teacher that is neither published nor given.
        given: A trained network in place of the named one.

    Raises:
        FileNotFoundError: If the weights are missing.
        ValueError: If they do not match the network or the data.
    """
    mean, std = data.mean, data.std
    if section.pretrained:
        published = published_for(section, data)
        mean, std = published.mean, published.std
    if given is not None:
        pixels = section.size or side(data)
        network = factory.wrap(given, section.model, (3, pixels, pixels), **section.taps)
    else:
        network = network_of(section, data, section.size)
    if file is not None:
        about = _fill(network, section, data, file, progress)
        mean, std = about.get("mean", mean), about.get("std", std)
    report_taps(network, "teacher", progress)
    normalization = section.mean or mean, section.std or std
    return Teacher(network, *normalization, data.mean, data.std, size=section.size)


def _fill(
    network: FeatureExtractor, section: TeacherSection, data: Data, file: Path, progress: Progress
) -> dict[str, Any]:
    """Loads the weights of the teacher and returns the metadata of their file."""
    weights, about = processes.by_first(
        lambda: (checkpoint.load_weights(file), checkpoint.read_about(file))
    )
    note = checkpoint.fill(network.network, weights, str(file), section.weights)
    if note:
        progress.say(f"teacher: {note} (teacher.weights)")
    same_order(data.classes, about.get("classes", data.classes), str(file))
    return about


def report_taps(network: FeatureExtractor, role: str, progress: Progress) -> None:
    """Prints the taps of a network if they were detected automatically."""
    if network.found:
        progress.say(f"{network.found}; {role}.head and {role}.maps override it")
