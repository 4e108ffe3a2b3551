"""What would go wrong with a recipe, found in a minute, before hours are spent on it."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from topkd import checkpoint, evaluate, files
from topkd.data import Images, training_batches
from topkd.experiment import Experiment
from topkd.features import Batch, Features, Teacher
from topkd.recipe import STUDENT
from topkd.terms import Weighted, warnings
from topkd.train import Sums, Trainer

JUDGED = 2000  # test images that a teacher is tried on
GLANCE = 70  # batches that a loss may ask for; one that wants more learns from the teacher first
STEPS = 8  # of training that are timed, after two that are not
USUAL = {  # mean and standard deviation with which networks are commonly trained
    "of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "of CIFAR-100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "of CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "from -1 to 1": ((0.5,) * 3, (0.5,) * 3),
    "from 0 to 1": ((0.0,) * 3, (1.0,) * 3),
}

Verdict = Literal["good", "look", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of what the doctor says."""

    part: str
    found: str
    verdict: Verdict = "good"
    advice: str = ""


class _LearnsFirstError(Exception):
    """A loss asked for more of the teacher's answers than a glance."""


def examine(experiment: Experiment) -> list[Finding]:
    """Tries every part of a recipe that can be tried in a minute.

    Args:
        experiment: Whose teacher is there already; its folder is not touched.

    Returns:
        What was found, part by part; whatever cannot be built is a finding too.
    """
    findings = [*_data(experiment)]
    if experiment.recipe.teacher is not None:
        if not experiment.teacher_file.exists():
            return [*findings, _untrained(experiment)]
        findings += _teacher(experiment)
    for arm in experiment.recipe.arms:
        found, losses = _losses(experiment, arm)
        findings += found
        if arm == STUDENT and losses:
            findings += _cost(experiment, losses)
    return findings


def _untrained(experiment: Experiment) -> Finding:
    section = experiment.recipe.teacher
    assert section is not None
    if section.checkpoint is not None:
        advice = "set teacher.checkpoint to the file that holds its weights"
        return Finding("teacher", f"{experiment.teacher_file} is missing", "wrong", advice)
    found = f"not trained yet; {section.recipe} trains it first"
    advice = f"`topkd teacher {experiment.recipe.name}`, then ask again: the rest needs it"
    return Finding("teacher", found, "look", advice)


def _data(experiment: Experiment) -> Iterator[Finding]:
    data, size = experiment.data, experiment.recipe.batch_size
    images = len(data.train.target)
    counts = torch.bincount(data.train.target, minlength=len(data.classes))
    yield Finding(
        "data",
        f"{images:,} training and {len(data.test.target):,} {data.judged_on} images of "
        f"{len(data.classes)} classes, {int(counts.min())} to {int(counts.max())} each",
        "wrong" if counts.min() == 0 else "good",
        "a class without training images is never learnt" if counts.min() == 0 else "",
    )
    steps = images // size
    yield Finding(
        "batches",
        f"{steps} of {size} an epoch, {images - steps * size} images left out of each",
        "good" if steps >= 10 else "look",
        "" if steps >= 10 else "make batch_size smaller: an epoch has very few steps",
    )
    shown = data.train.read(torch.randperm(images, generator=_seeded())[: 4 * size], None)
    mean, std = shown.mean((0, 2, 3)), shown.std((0, 2, 3))
    usual = bool((mean.abs() < 0.5).all() and (std > 0.5).all() and (std < 2).all())
    yield Finding(
        "normalisation",
        f"images have mean {_numbers(mean)} and deviation {_numbers(std)}",
        "good" if usual else "look",
        "" if usual else "they should be near 0 and 1: check mean and std of the data",
    )


def _teacher(experiment: Experiment) -> Iterator[Finding]:
    teacher, data = experiment.teacher, experiment.data
    assert teacher is not None
    images = _some(data.test)
    predictions = evaluate.predict(teacher, images, experiment.device.device)
    top1, recorded = evaluate.top_k(predictions, 1), _recorded(experiment)
    noise = 100 * 3 * max(top1 / 100 * (1 - top1 / 100) / len(images.target), 1e-9) ** 0.5
    low = recorded is not None and top1 < recorded - noise
    said = "no accuracy is recorded" if recorded is None else f"recorded is {recorded:.2f} %"
    poor = recorded is None and top1 < 5 * 100 / len(data.classes)
    yield Finding(
        "teacher",
        f"{top1:.2f} % of {len(images.target)} {data.judged_on} images are right; {said}",
        "wrong" if low or poor else "good",
        "see the next lines" if low or poor else "",
    )
    if recorded is None or low:
        yield from _normalisations(experiment, images, top1)
    yield from _class_order(predictions, top1)


def _normalisations(experiment: Experiment, images: Images, top1: float) -> Iterator[Finding]:
    """Tries the teacher with other means and deviations, and tells if one suits it better."""
    teacher, data = experiment.teacher, experiment.data
    assert teacher is not None
    found = {}
    for name, (mean, std) in USUAL.items():
        other = Teacher(teacher.network, mean, std, data.mean, data.std)
        other = other.to(experiment.device.device)
        predictions = evaluate.predict(other, images, experiment.device.device)
        found[name] = evaluate.top_k(predictions, 1)
    best = max(found, key=lambda name: found[name])
    if found[best] > top1 + 2:
        mean, std = USUAL[best]
        yield Finding(
            "teacher's normalisation",
            f"with that {best} it would be {found[best]:.2f} %",
            "wrong",
            f"set teacher.mean={list(mean)} and teacher.std={list(std)}",
        )


def _class_order(predictions: evaluate.Predictions, top1: float) -> Iterator[Finding]:
    """Tells if another order of the classes would make the teacher right."""
    classes = predictions.logits.shape[1]
    pairs = predictions.target * classes + predictions.logits.argmax(1)
    counts = torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()
    label, guess = linear_sum_assignment(-counts)
    reordered = 100 * counts[label, guess].sum() / counts.sum()
    moved = int((label != guess).sum())
    if reordered > 1.5 * top1 + 5:
        yield Finding(
            "class order",
            f"{reordered:.2f} % would be right if {moved} classes had another number",
            "wrong",
            "number the classes of the data as the teacher's training did",
        )


def _losses(experiment: Experiment, arm: str) -> tuple[list[Finding], list[Weighted]]:
    """Builds the losses of one run as far as that takes no training."""
    part, findings = f"losses of {arm}", []
    whole = experiment.source(experiment.new_student())

    def answers(epoch: int) -> Iterator[tuple[Batch, Features]]:
        yield from islice(whole.answers(epoch), GLANCE)
        raise _LearnsFirstError

    built: list[Weighted] = []
    for term in experiment.recipe.arms[arm]:
        try:
            (weighted,) = experiment.build([term], replace(whole, answers=answers), 0)
        except _LearnsFirstError:
            advice = "`topkd ripsnet` does it, once for all runs; `via: exact` needs none"
            found = f"{term.title} learns from the teacher's answers to all images first"
            findings.append(Finding(part, found, "look", advice))
            continue
        except (ValueError, IndexError) as error:
            findings.append(Finding(part, f"{term.title}: {error}", "wrong", "see the message"))
            continue
        built.append(weighted)
        fidelity = weighted.loss.facts().get("fidelity")
        if fidelity is not None:
            findings.append(_fidelity(part, term.title, fidelity["r2"]))
    titles = ", ".join(weighted.term.title for weighted in built)
    findings.append(Finding(part, f"{titles}: the taps have the shapes that they need"))
    return findings, built


def _fidelity(part: str, title: str, r2: float) -> Finding:
    poor = r2 < 0.5
    return Finding(
        part,
        f"the approximator of {title} explains {max(r2, 0):.0%} of what differs between clouds",
        "look" if poor else "good",
        "`via: exact` explains all of it and is faster" if poor else "",
    )


def _cost(experiment: Experiment, losses: Sequence[Weighted]) -> Iterator[Finding]:
    """Trains a few steps of the recipe's own run, to see what an epoch takes."""
    recipe, data = experiment.recipe, experiment.data
    student = experiment.new_student()
    trainer = Trainer(
        student, experiment.teacher, losses, data, recipe, 0, experiment.device, experiment.progress
    )
    student.train()
    sums, seconds = Sums(), []
    batches = training_batches(data.train, recipe.batch_size, 0, 1)
    for step, batch in enumerate(islice(batches, 2 + STEPS)):
        start = time.perf_counter()
        trainer.step(batch, 1, sums, measure=step == 0)
        seconds.append(time.perf_counter() - start)
    images = _some(data.test)
    start = time.perf_counter()
    evaluate.predict(student.eval(), images, experiment.device.device)
    judging = (time.perf_counter() - start) / len(images.target) * len(data.test.target)
    epoch = statistics.median(seconds[2:] or seconds) * trainer.steps + judging
    yield Finding(
        "time",
        f"an epoch takes about {_duration(epoch)} here; {recipe.epochs} epochs of "
        f"{len(recipe.arms)} runs {_duration(epoch * recipe.epochs * len(recipe.arms))}",
        advice="`topkd run RECIPE --seeds` multiplies it" if epoch > 600 else "",
    )
    yield Finding("memory", _memory(experiment.device.device))
    for line in warnings(sums.means("share/"), sums.means("cosine/")):
        yield Finding("balance of the terms", line, "look", "see `share:` in the docs of recipes")


def _recorded(experiment: Experiment) -> float | None:
    """Finds the accuracy that a teacher had when it was saved, in percent."""
    path = experiment.teacher_file
    beside = path.parent / "result.json"
    if beside.exists():
        return float(files.read_json(beside)["last"]["top1"])
    return checkpoint.read_accuracy(path)


def _some(images: Images) -> Images:
    """So many images that an accuracy is known to a point or two, always the same."""
    from topkd.data import Subset

    order = torch.randperm(len(images.target), generator=_seeded())[:JUDGED]
    return Subset(images, order.sort().values)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _numbers(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values.tolist()) + ")"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        whole = torch.cuda.get_device_properties(device).total_memory
        return f"{used / 2**30:.1f} of {whole / 2**30:.0f} GB of the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / 2**30:.1f} GB at most so far"
