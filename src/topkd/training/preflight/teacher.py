"""Preflight checks of the teacher: accuracy, normalization, crop and order of classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from topkd._io import files
from topkd.data import Images, with_crop
from topkd.evaluation import metrics
from topkd.evaluation.metrics import Predictions
from topkd.features import Teacher
from topkd.models import checkpoint
from topkd.training.experiment import Experiment
from topkd.training.preflight.finding import Finding, Verdict, as_changes, random_subset

TEACHER_IMAGES = 2000  # evaluation images for the teacher
USUAL = {  # common normalizations: mean and standard deviation
    "as for ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "as for CIFAR-100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "as for CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "to -1 ... 1": ((0.5,) * 3, (0.5,) * 3),
    "to 0 ... 1": ((0.0,) * 3, (1.0,) * 3),
}
CROPS = (0.875, 0.9, 0.95, 1.0)  # common evaluation crops, as fractions of the shorter side


def check_teacher(experiment: Experiment) -> tuple[list[Finding], bool]:
    """Evaluates the teacher; the second value is False if it cannot be used."""
    section, advice = experiment.recipe.teacher, "fix this first: the other checks need the teacher"
    if section is None:
        return [], True
    if section.recipe is not None and section.checkpoint is None:
        done = experiment.teacher_file.parent / "result.json"  # written last
        if not done.exists():
            advice = "run `topkd teacher`, then repeat: the other checks need the teacher"
            found = f"not trained yet, by {section.recipe}"
            return [Finding("teacher", found, "warning", advice)], False
    try:
        teacher = experiment.teacher
        assert teacher is not None
        return [*_evaluated(experiment, teacher)], True
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        found = f"{where}{error.strerror or error}"
    except (ValueError, RuntimeError) as error:  # raised by torch for unsupported images
        found = str(error)
    return [Finding("teacher", found, "error", advice)], False


def _evaluated(experiment: Experiment, teacher: Teacher) -> Iterator[Finding]:
    """Compares the teacher's accuracy with the recorded one and searches for causes of a loss."""
    data, images = experiment.data, random_subset(experiment.data.test, TEACHER_IMAGES)
    predictions = metrics.predict(teacher, images, experiment.device.device)
    top1, recorded = metrics.top_k(predictions, 1), _recorded(experiment)
    chance = 100 / len(data.classes)
    expected, least = f"none is recorded, chance is {chance:.2f} %", chance + _noise(predictions)
    if recorded is not None:
        expected, least = f"recorded is {recorded:.2f} %", recorded - _noise(predictions)
    causes: list[Finding] = []
    if recorded is None or top1 < least:
        causes, teacher, best = _normalizations(experiment, teacher, images, predictions)
        found, best = _crops(experiment, teacher, images, best)
        causes += [*found, *_class_order(best, data.classes)]
    verdict: Verdict = "error" if top1 < least else "ok" if recorded is not None else "warning"
    advice = {
        "ok": "",
        "warning": "check that this is the expected accuracy",
        "error": "no other mean, std, crop or order of classes helps: check that network and "
        "images are those of its training",
    }
    yield Finding(
        "teacher",
        f"top-1 {top1:.2f} % on {len(images.target):,} {data.eval_split} images; {expected}",
        verdict,
        "see the next lines" if causes else advice[verdict],
    )
    yield from causes


def _recorded(experiment: Experiment) -> float | None:
    """Returns the recorded top-1 accuracy of the teacher in percent; None if unknown."""
    section = experiment.recipe.teacher
    if section is None or section.pretrained:
        return None
    path = experiment.teacher_file
    beside = path.parent / "result.json"
    if path.name == "student.safetensors" and beside.exists():
        return float(files.read_sealed(beside)["last"]["top1"])
    return checkpoint.read_accuracy(path)


def _normalizations(
    experiment: Experiment, teacher: Teacher, images: Images, predictions: Predictions
) -> tuple[list[Finding], Teacher, Predictions]:
    """Evaluates the teacher with other normalizations.

    Returns:
        A finding if one is better, and the teacher and its predictions with the best one.
    """
    data, section = experiment.data, experiment.recipe.teacher
    assert section is not None
    about = {} if section.pretrained else checkpoint.read_about(experiment.teacher_file)
    recorded = {"as in its file": (about["mean"], about["std"])} if "mean" in about else {}
    known = {**recorded, "as the data": (data.mean, data.std), **USUAL}
    others, tried = {}, {}
    for name, (mean, std) in known.items():
        other = Teacher(teacher.network, mean, std, data.mean, data.std, section.size)
        device = experiment.device.device
        others[name] = other.to(device)
        tried[name] = metrics.predict(others[name], images, device)
    best = max(tried, key=lambda name: metrics.top_k(tried[name], 1))
    top1 = metrics.top_k(tried[best], 1)
    if top1 <= metrics.top_k(predictions, 1) + _noise(predictions):
        return [], teacher, predictions
    found = f"top-1 {top1:.2f} % on images normalized {best}"
    advice = f"set {as_changes('teacher', *known[best])}"
    finding = Finding("teacher's normalization", found, "error", advice)
    return [finding], others[best], tried[best]


def _crops(
    experiment: Experiment, teacher: Teacher, images: Images, predictions: Predictions
) -> tuple[list[Finding], Predictions]:
    """Evaluates the teacher with other crops of the images.

    Returns:
        A finding if one is better, and the predictions with the best one.
    """
    tried = {}
    for crop in CROPS:
        others = with_crop(images, crop)
        if others is not None:
            tried[crop] = metrics.predict(teacher, others, experiment.device.device)
    best = max(tried, key=lambda crop: metrics.top_k(tried[crop], 1), default=None)
    if best is None:
        return [], predictions
    top1 = metrics.top_k(tried[best], 1)
    if top1 <= metrics.top_k(predictions, 1) + _noise(predictions):
        return [], predictions
    found = f"top-1 {top1:.2f} % on center crops of {best:g}"
    return [Finding("crop", found, "error", f"set data.crop={best:g}")], tried[best]


def _class_order(predictions: Predictions, classes: Sequence[str]) -> Iterator[Finding]:
    """Tests whether the teacher was trained with another order of classes.

    The best permutation for one half of the images is evaluated on the other half, to exclude
    chance. It is reported if it corrects a third of all errors.
    """
    fitted, held_out = (
        Predictions(*(t[half::2] for t in vars(predictions).values())) for half in (0, 1)
    )
    labels, predicted = linear_sum_assignment(-_confusion(fitted, len(classes)).numpy())
    counts = _confusion(held_out, len(classes))
    here = 100 * (counts.trace() / counts.sum()).item()
    there = 100 * (counts[labels, predicted].sum() / counts.sum()).item()
    if there - here <= max((100 - here) / 3, _noise(held_out)):
        return
    moved = [(int(counts[a, b]), a, b) for a, b in zip(labels, predicted, strict=True) if a != b]
    _, label, output = max(moved)
    yield Finding(
        "class order",
        f"top-1 {there:.2f} % with its classes in another order: class {label}, "
        f"{classes[label]!r}, is output {output} of the teacher",
        "error",
        "order the classes of the data as in the teacher's training",
    )


def _confusion(predictions: Predictions, classes: int) -> Tensor:
    """Computes the confusion matrix, (classes, classes), with targets as rows."""
    pairs = predictions.target * classes + predictions.logits.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def _noise(predictions: Predictions) -> float:
    """Returns three standard errors of the accuracy, in percent."""
    accuracy, images = metrics.top_k(predictions, 1) / 100, len(predictions.target)
    return 300 * max(accuracy * (1 - accuracy) / images, 1 / images**2) ** 0.5
