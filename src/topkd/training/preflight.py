"""Preflight checks: tests a recipe for a minute before training."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NoReturn

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from topkd._io import files
from topkd._io.progress import Progress
from topkd.config.recipe import Recipe, Term
from topkd.data import Images, Subset, training_batches, with_crop
from topkd.evaluation import metrics
from topkd.evaluation.metrics import Predictions
from topkd.features import FeatureExtractor, Teacher
from topkd.losses.base import LossTerm
from topkd.models import checkpoint
from topkd.topology.approximation import MIN_R2
from topkd.training.experiment import Experiment
from topkd.training.objective import warnings
from topkd.training.optim import learning_rate
from topkd.training.tracking import Sums
from topkd.training.trainer import Trainer

TEACHER_IMAGES = 2000  # evaluation images for the teacher
WARM = 3  # untimed training steps, in which gradients are measured
TIMED = 20  # timed training steps
PATIENCE = 30.0  # time limit of the timed steps, in seconds
USUAL = {  # common normalizations: mean and standard deviation
    "as for ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "as for CIFAR-100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "as for CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "to -1 ... 1": ((0.5,) * 3, (0.5,) * 3),
    "to 0 ... 1": ((0.0,) * 3, (1.0,) * 3),
}
CROPS = (0.875, 0.9, 0.95, 1.0)  # common evaluation crops, as fractions of the shorter side

Verdict = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report of ``topkd doctor``."""

    part: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""
    """Suggested change."""


def examine(experiment: Experiment) -> list[Finding]:
    """Tests every part of a recipe that can be tested in a minute.

    No training is completed and no file is written. An untrained approximator is reported; an
    untrained teacher ends the checks.

    Args:
        experiment: The experiment.

    Returns:
        Findings, part by part. Errors are findings as well, except errors in reading the data.

    Raises:
        FileNotFoundError: If data files are missing.
        ValueError: If the data cannot be read.
    """
    torch.manual_seed(0)
    recipe, seconds = experiment.recipe, dict[str, float]()
    with experiment.progress.bar("Doctor", 2 + len(recipe.variants), "parts") as advance:
        advance(0, "checking the data")
        findings = [*_data(experiment)]
        advance(1, "evaluating the teacher")
        found, is_there = _teacher(experiment)
        findings += found
        if not is_there:
            return findings
        variants = recipe.variants if len(experiment.data.train.target) >= recipe.batch_size else ()
        for variant in variants:
            advance(1, f"training a few steps of {variant}")
            found, epoch = _run(experiment, variant)
            findings += found
            if epoch is not None:
                seconds[variant] = epoch
    if seconds:
        findings += [_time(recipe, seconds), Finding("memory", _memory(experiment.device.device))]
    faults = experiment.data.faults.lines()
    return findings + [Finding("data", line, "warning", "repair the files") for line in faults]


def _data(experiment: Experiment) -> Iterator[Finding]:
    data, size = experiment.data, experiment.recipe.batch_size
    images = len(data.train.target)
    counts = torch.bincount(data.train.target, minlength=len(data.classes))
    absent = [data.classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
    each = "" if counts.min() == counts.max() else f"{int(counts.min())} to "
    listed = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    yield Finding(
        "data",
        f"{images:,} training and {len(data.test.target):,} {data.eval_split} images of "
        f"{len(data.classes)} classes, {each}{int(counts.max())} each",
        "error" if absent else "ok",
        f"no training images of {listed}: add images, or remove the class" if absent else "",
    )
    steps = images // size
    yield Finding(
        "batches",
        f"{steps} of {size} images per epoch, {images - steps * size} images dropped",
        "ok" if steps >= 10 else "warning" if steps else "error",
        "" if steps >= 10 else "reduce batch_size: an epoch has few steps",
    )
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    sample = data.train.read(order[: 4 * size], None)
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
    usual = bool((mean.abs() < 1).all() and (std > 1 / 3).all() and (std < 3).all())
    data_mean, data_std = torch.tensor(data.mean), torch.tensor(data.std)
    measured = (mean * data_std + data_mean).tolist(), (std * data_std).tolist()
    yield Finding(
        "normalization",
        f"normalized images have mean {_spaced(mean)} and std {_spaced(std)}",
        "ok" if usual else "warning",
        "" if usual else f"for mean 0 and std 1, set {_settings('data', *measured)}",
    )


# --- The teacher ---------------------------------------------------------------------------------


def _teacher(experiment: Experiment) -> tuple[list[Finding], bool]:
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
    data, images = experiment.data, _some(experiment.data.test, TEACHER_IMAGES)
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
    advice = f"set {_settings('teacher', *known[best])}"
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


# --- The runs ------------------------------------------------------------------------------------


class _NeedsFitError(Exception):
    """Raised when a loss starts to fit to the teacher."""


class _NoFit(Progress):
    """Raises when a loss starts to fit, which acquires a lock or shows a bar."""

    def alone(self, path: Path) -> NoReturn:
        raise _NeedsFitError

    def bar(self, title: str, total: int, unit: str) -> NoReturn:
        raise _NeedsFitError


def _run(experiment: Experiment, variant: str) -> tuple[list[Finding], float | None]:
    """Tests one run; the second value is the seconds per epoch if it can be trained."""
    part, other = f"losses of {variant}", "use other taps or options, or another loss"
    try:
        student = experiment.new_student()
        findings, losses = _losses(experiment, variant, student)
        if any(finding.verdict == "error" for finding in findings):
            return findings, None
        tried = _train(experiment, student, losses)
    except torch.OutOfMemoryError:
        advice = f"reduce batch_size below {experiment.recipe.batch_size}"
        return [Finding("memory", f"a step of {variant} does not fit", "error", advice)], None
    except (ValueError, RuntimeError) as error:  # raised by torch for incompatible shapes
        return [Finding(part, str(error), "error", other)], None
    if tried is None:
        return findings, None
    sums, seconds = tried
    names = ", ".join(weighted.title for weighted in losses)
    findings.append(Finding(part, f"{names}: all required features are available"))
    weighted_titles = {w.title for w in losses if w.settings.weight or w.settings.share}
    shares = {t: share for t, share in sums.means("share/").items() if t in weighted_titles}
    for line in warnings(shares, sums.means("cosine/")):
        found, _, advice = line.rpartition("; ")
        findings.append(Finding(part, f"in the first steps, {found}", "warning", advice))
    return findings, seconds


def _losses(
    experiment: Experiment, variant: str, student: FeatureExtractor
) -> tuple[list[Finding], list[LossTerm]]:
    """Builds the losses of a run that do not need fitting."""
    part, findings, built = f"losses of {variant}", list[Finding](), list[LossTerm]()
    context = replace(experiment.context(student), progress=_NoFit(quiet=True))
    for term in experiment.recipe.variants[variant]:
        try:
            built += experiment.build([term], context, 0)
        except _NeedsFitError:
            found = f"{term.title} must first be fitted to the teacher, once for all runs"
            advice = "`topkd run` does this"
            if "via" in term.options:
                advice = "run `topkd ripsnet`, then repeat; `via: exact` needs no fitting"
            findings.append(Finding(part, found, "warning", advice))
            continue
        except (OSError, ValueError) as error:
            found = str(error) if isinstance(error, ValueError) else f"{term.title}: {error}"
            advice = "use other taps or options, or another loss"
            findings.append(Finding(part, found, "error", advice))
            continue
        fidelity = built[-1].loss.metadata().get("fidelity")
        if fidelity is not None:
            poor = fidelity["r2"] < MIN_R2
            found = (
                f"the approximator of {term.title} explains {max(fidelity['r2'], 0):.0%} of the "
                "variance between clouds; cosine of its gradient with the exact one: "
                f"{fidelity['gradient_cosine']:.2f}"
            )
            advice = "use `via: exact`, which has no error and is faster" if poor else ""
            findings.append(Finding(part, found, "warning" if poor else "ok", advice))
    return findings, built


def _train(
    experiment: Experiment, student: FeatureExtractor, losses: Sequence[LossTerm]
) -> tuple[Sums, float] | None:
    """Trains a few steps of a run, such that each term is active in at least one step.

    Returns:
        Metrics, and the seconds of the epoch with most active terms; None if no term has a
        weight.
    """
    recipe, data, device = experiment.recipe, experiment.data, experiment.device
    terms = [weighted.settings for weighted in losses]
    fullest = _fullest(terms, recipe.epochs)
    if not _counting(terms, fullest, recipe.epochs):
        return None
    starts = {term.start for term in terms if _counting(terms, term.start, recipe.epochs)}
    others = sorted(starts - {fullest})
    epochs = [*others, *[fullest] * (WARM + TIMED)]
    trainer = Trainer(
        student, experiment.teacher, losses, data, recipe, 0, device, experiment.progress
    )
    student.train()
    sums, stamps, untimed = Sums(), [time.perf_counter()], len(others) + WARM
    batches = training_batches(data.train, recipe.batch_size, 0, 1)
    for step, (epoch, batch) in enumerate(zip(epochs, batches, strict=False)):
        for weighted in losses:
            weighted.on_epoch_start(epoch)
        rate = learning_rate(recipe.optimizer, step / trainer.steps, recipe.epochs)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        trainer.step(batch, epoch, sums, measure=step < untimed)
        stamps.append(time.perf_counter())
        if step >= untimed and stamps[-1] - stamps[0] > PATIENCE:
            break
    steps = [after - before for before, after in pairwise(stamps)]
    sample = _some(data.test, 500)
    start = time.perf_counter()
    with device.autocast():
        metrics.predict(student.eval(), sample, device.device)
    evaluation = (time.perf_counter() - start) * len(data.test.target) / len(sample.target)
    return sums, statistics.median(steps[untimed:] or steps[-1:]) * trainer.steps + evaluation


def _counting(terms: Sequence[Term], epoch: int, epochs: int) -> float:
    """Sums the schedules of the terms with a weight, i.e. counts the active terms."""
    return sum(term.schedule(epoch, epochs) for term in terms if term.share is None)


def _fullest(terms: Sequence[Term], epochs: int) -> int:
    """Finds the first epoch with the most active terms.

    Schedules are piecewise linear, so the maximum lies next to one of their breakpoints.
    """
    turns = {1}
    for term in terms:
        last = epochs if term.stop is None else min(term.stop, epochs)
        rise, fall = max(1, term.warmup), max(1, term.decay)
        meeting = ((last + 1) * rise + (term.start - 1) * fall) // (rise + fall)
        turns |= {term.start, term.start + rise, last, last - fall, meeting}
    near = {turn + step for turn in turns for step in (-1, 0, 1)}
    return max(
        sorted(epoch for epoch in near if 1 <= epoch <= epochs),
        key=lambda epoch: _counting(terms, epoch, epochs),
    )


def _time(recipe: Recipe, seconds: Mapping[str, float]) -> Finding:
    each = ", ".join(f"{_duration(epoch)} ({variant})" for variant, epoch in seconds.items())
    per_seed = _duration(recipe.epochs * sum(seconds.values()))
    return Finding(
        "time", f"about {each} per epoch; {recipe.epochs} epochs of all runs: {per_seed} per seed"
    )


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{used / 2**30:.1f} of {total / 2**30:.0f} GB of the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / 2**30:.1f} GB with all data"


def _some(images: Images, count: int) -> Images:
    """Returns a fixed random subset of images."""
    order = torch.randperm(len(images.target), generator=torch.Generator().manual_seed(0))
    return Subset(images, order[:count].sort().values)


def _spaced(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())


def _settings(section: str, mean: Sequence[float], std: Sequence[float]) -> str:
    """Formats mean and std as changes on the command line."""
    return f"'{section}.mean={_listed(mean)}' '{section}.std={_listed(std)}'"


def _listed(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"
