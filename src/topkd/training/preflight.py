"""What would go wrong with a recipe, found in a minute, before hours are spent on it."""

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

JUDGED = 2000  # test images that a teacher is tried on
WARM = 3  # steps of training in which the terms are weighed, and nothing is timed
TIMED = 20  # steps that are timed
PATIENCE = 30.0  # seconds after which no further step is timed
USUAL = {  # mean and standard deviation with which networks are commonly trained
    "as for ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "as for CIFAR-100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "as for CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "to -1 ... 1": ((0.5,) * 3, (0.5,) * 3),
    "to 0 ... 1": ((0.0,) * 3, (1.0,) * 3),
}
CROPS = (0.875, 0.9, 0.95, 1.0)  # of the shorter side, as networks are commonly evaluated

Verdict = Literal["good", "look", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of what the doctor says."""

    part: str
    found: str
    verdict: Verdict = "good"
    advice: str = ""
    """What to change."""


def examine(experiment: Experiment) -> list[Finding]:
    """Tries every part of a recipe that can be tried in a minute.

    Nothing is trained to the end and nothing is written: an approximator that has not been trained
    is told, and a teacher that has not been trained ends the examination.

    Args:
        experiment: The recipe, and where its runs are kept.

    Returns:
        What was found, part by part. What cannot be used is a finding too, but for the data.

    Raises:
        FileNotFoundError: If files of the data are missing.
        ValueError: If the data cannot be read.
    """
    torch.manual_seed(0)
    recipe, seconds = experiment.recipe, dict[str, float]()
    with experiment.progress.bar("Doctor", 2 + len(recipe.variants), "parts") as advance:
        advance(0, "looks at the data")
        findings = [*_data(experiment)]
        advance(1, "asks the teacher")
        found, is_there = _teacher(experiment)
        findings += found
        if not is_there:
            return findings
        variants = recipe.variants if len(experiment.data.train.target) >= recipe.batch_size else ()
        for variant in variants:
            advance(1, f"tries a few steps of {variant}")
            found, epoch = _run(experiment, variant)
            findings += found
            if epoch is not None:
                seconds[variant] = epoch
    if seconds:
        findings += [_time(recipe, seconds), Finding("memory", _memory(experiment.device.device))]
    faults = experiment.data.faults.lines()
    return findings + [Finding("data", line, "look", "mend the files") for line in faults]


def _data(experiment: Experiment) -> Iterator[Finding]:
    data, size = experiment.data, experiment.recipe.batch_size
    images = len(data.train.target)
    counts = torch.bincount(data.train.target, minlength=len(data.classes))
    absent = [data.classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
    each = "" if counts.min() == counts.max() else f"{int(counts.min())} to "
    named = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    yield Finding(
        "data",
        f"{images:,} training and {len(data.test.target):,} {data.eval_split} images of "
        f"{len(data.classes)} classes, {each}{int(counts.max())} each",
        "wrong" if absent else "good",
        f"no student learns {named}: add training images, or take the name away" if absent else "",
    )
    steps = images // size
    yield Finding(
        "batches",
        f"{steps} of {size} images an epoch, {images - steps * size} images left over",
        "good" if steps >= 10 else "look" if steps else "wrong",
        "" if steps >= 10 else "make batch_size smaller: an epoch has few steps",
    )
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    shown = data.train.read(order[: 4 * size], None)
    mean, std = shown.mean((0, 2, 3)), shown.std((0, 2, 3))
    usual = bool((mean.abs() < 1).all() and (std > 1 / 3).all() and (std < 3).all())
    own_mean, own_std = torch.tensor(data.mean), torch.tensor(data.std)
    right = _settings("data", (mean * own_std + own_mean).tolist(), (std * own_std).tolist())
    yield Finding(
        "normalization",
        f"normalized images have mean {_spaced(mean)} and deviation {_spaced(std)}",
        "good" if usual else "look",
        "" if usual else f"they should be near 0 and 1, which they are by {right}",
    )


# --- The teacher ---------------------------------------------------------------------------------


def _teacher(experiment: Experiment) -> tuple[list[Finding], bool]:
    """Tries the teacher, and tells whether what needs it can be tried."""
    section, advice = experiment.recipe.teacher, "this first: all else needs the teacher"
    if section is None:
        return [], True
    if section.recipe is not None and section.checkpoint is None:
        done = experiment.teacher_file.parent / "result.json"  # what its training writes last
        if not done.exists():
            advice = "`topkd teacher` does it; then ask again, for all else needs it"
            return [Finding("teacher", f"{section.recipe} trains it first", "look", advice)], False
    try:
        teacher = experiment.teacher
        assert teacher is not None
        return [*_judge(experiment, teacher)], True
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        found = f"{where}{error.strerror or error}"
    except (ValueError, RuntimeError) as error:  # torch's own, of images that it cannot be shown
        found = str(error)
    return [Finding("teacher", found, "wrong", advice)], False


def _judge(experiment: Experiment, teacher: Teacher) -> Iterator[Finding]:
    """Compares the teacher's accuracy with the recorded one, and looks for what lowers it."""
    data, images = experiment.data, _some(experiment.data.test, JUDGED)
    predictions = metrics.predict(teacher, images, experiment.device.device)
    top1, recorded = metrics.top_k(predictions, 1), _recorded(experiment)
    chance = 100 / len(data.classes)
    said, least = f"none is recorded, guessing gives {chance:.2f} %", chance + _noise(predictions)
    if recorded is not None:
        said, least = f"recorded is {recorded:.2f} %", recorded - _noise(predictions)
    causes: list[Finding] = []
    if recorded is None or top1 < least:
        causes, teacher, best = _normalizations(experiment, teacher, images, predictions)
        found, best = _crops(experiment, teacher, images, best)
        causes += [*found, *_class_order(best, data.classes)]
    verdict: Verdict = "wrong" if top1 < least else "good" if recorded is not None else "look"
    advice = {
        "good": "",
        "look": "is that what it should reach?",
        "wrong": "no other mean, std, crop or order of classes helps: is it this network, are "
        "these the images it was trained for?",
    }
    yield Finding(
        "teacher",
        f"right on {top1:.2f} % of {len(images.target):,} {data.eval_split} images; {said}",
        verdict,
        "what the next lines say" if causes else advice[verdict],
    )
    yield from causes


def _recorded(experiment: Experiment) -> float | None:
    """Finds the accuracy that the teacher had when it was saved, in percent."""
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
    """Tries a teacher with other means and deviations, and tells if one suits it better.

    Returns:
        The finding, if there is one, and the teacher and its predictions with the best of them.
    """
    data, section = experiment.data, experiment.recipe.teacher
    assert section is not None
    about = {} if section.pretrained else checkpoint.read_about(experiment.teacher_file)
    told = {"as its file says": (about["mean"], about["std"])} if "mean" in about else {}
    known = {**told, "as the data": (data.mean, data.std), **USUAL}
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
    found = f"of images normalized {best} it is right on {top1:.2f} %"
    advice = f"set {_settings('teacher', *known[best])}"
    finding = Finding("teacher's normalization", found, "wrong", advice)
    return [finding], others[best], tried[best]


def _crops(
    experiment: Experiment, teacher: Teacher, images: Images, predictions: Predictions
) -> tuple[list[Finding], Predictions]:
    """Tries a teacher on other crops of the images, and tells if one suits it better.

    Returns:
        The finding, if there is one, and the predictions of the best of them.
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
    found = f"of the middle {best:g} of each picture it is right on {top1:.2f} %"
    return [Finding("crop", found, "wrong", f"set data.crop={best:g}")], tried[best]


def _class_order(predictions: Predictions, classes: Sequence[str]) -> Iterator[Finding]:
    """Tells if a teacher would be right had the classes another order.

    The best order for one half of the images is tried on the other half: a fit of chance fails
    there. It has to mend a third of all errors.
    """
    fitted, judged = (
        Predictions(*(t[half::2] for t in vars(predictions).values())) for half in (0, 1)
    )
    labels, guesses = linear_sum_assignment(-_confusion(fitted, len(classes)).numpy())
    counts = _confusion(judged, len(classes))
    here = 100 * (counts.trace() / counts.sum()).item()
    there = 100 * (counts[labels, guesses].sum() / counts.sum()).item()
    if there - here <= max((100 - here) / 3, _noise(judged)):
        return
    moved = [(int(counts[a, b]), a, b) for a, b in zip(labels, guesses, strict=True) if a != b]
    _, label, guess = max(moved)
    yield Finding(
        "class order",
        f"with its classes in another order it is right on {there:.2f} %: class {label}, "
        f"{classes[label]!r}, is number {guess} to the teacher",
        "wrong",
        "number the classes of the data as the teacher's training did",
    )


def _confusion(predictions: Predictions, classes: int) -> Tensor:
    """Counts how often an image of class i is taken for class j, (classes, classes)."""
    pairs = predictions.target * classes + predictions.logits.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def _noise(predictions: Predictions) -> float:
    """Three standard deviations of an accuracy on so many images, in percent."""
    right, images = metrics.top_k(predictions, 1) / 100, len(predictions.target)
    return 300 * max(right * (1 - right) / images, 1 / images**2) ** 0.5


# --- The runs ------------------------------------------------------------------------------------


class _LearnsFirstError(Exception):
    """A loss began to learn from the teacher."""


class _NoLearning(Progress):
    """Stops a loss where it would begin to learn, or would show how far it is."""

    def alone(self, path: Path) -> NoReturn:
        raise _LearnsFirstError

    def bar(self, title: str, total: int, unit: str) -> NoReturn:
        raise _LearnsFirstError


def _run(experiment: Experiment, variant: str) -> tuple[list[Finding], float | None]:
    """Tries one run, and tells the seconds of an epoch if it can be trained."""
    part, other = f"losses of {variant}", "other taps or options, or another loss"
    try:
        student = experiment.new_student()
        findings, losses = _losses(experiment, variant, student)
        if any(finding.verdict == "wrong" for finding in findings):
            return findings, None
        tried = _train(experiment, student, losses)
    except torch.OutOfMemoryError:
        advice = f"make batch_size smaller than {experiment.recipe.batch_size}"
        return [Finding("memory", f"a step of {variant} does not fit", "wrong", advice)], None
    except (ValueError, RuntimeError) as error:  # torch's own, of shapes that do not go together
        return [Finding(part, str(error), "wrong", other)], None
    if tried is None:
        return findings, None
    sums, seconds = tried
    names = ", ".join(weighted.title for weighted in losses)
    findings.append(Finding(part, f"{names}: the taps give what they need"))
    weighing = {w.title for w in losses if w.settings.weight or w.settings.share}
    shares = {t: share for t, share in sums.means("share/").items() if t in weighing}
    for line in warnings(shares, sums.means("cosine/")):
        found, _, advice = line.rpartition("; ")
        findings.append(Finding(part, f"at the beginning {found}", "look", advice))
    return findings, seconds


def _losses(
    experiment: Experiment, variant: str, student: FeatureExtractor
) -> tuple[list[Finding], list[LossTerm]]:
    """Builds the losses of a run, as far as that takes no learning."""
    part, findings, built = f"losses of {variant}", list[Finding](), list[LossTerm]()
    source = replace(experiment.context(student), progress=_NoLearning(quiet=True))
    for term in experiment.recipe.variants[variant]:
        try:
            built += experiment.build([term], source, 0)
        except _LearnsFirstError:
            found = f"{term.title} has to learn from the teacher first, once for all runs"
            advice = "`topkd run` does that"
            if "via" in term.options:
                advice = "`topkd ripsnet` does that, then ask again; `via: exact` needs none"
            findings.append(Finding(part, found, "look", advice))
            continue
        except (OSError, ValueError) as error:
            found = str(error) if isinstance(error, ValueError) else f"{term.title}: {error}"
            findings.append(Finding(part, found, "wrong", "other taps or options, or another loss"))
            continue
        fidelity = built[-1].loss.metadata().get("fidelity")
        if fidelity is not None:
            poor = fidelity["r2"] < MIN_R2
            found = (
                f"the approximator of {term.title} explains {max(fidelity['r2'], 0):.0%} of what "
                "differs between clouds; cosine of its gradient with the exact one "
                f"{fidelity['gradient_cosine']:.2f}"
            )
            advice = "`via: exact` explains all of it and is faster" if poor else ""
            findings.append(Finding(part, found, "look" if poor else "good", advice))
    return findings, built


def _train(
    experiment: Experiment, student: FeatureExtractor, losses: Sequence[LossTerm]
) -> tuple[Sums, float] | None:
    """Trains a few steps of a run, with each term in one of them at least.

    Returns:
        What was measured, and the seconds of the epoch in which most terms count; None if there is
        no term with a weight.
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
    judged = _some(data.test, 500)
    start = time.perf_counter()
    with device.autocast():
        metrics.predict(student.eval(), judged, device.device)
    judging = (time.perf_counter() - start) * len(data.test.target) / len(judged.target)
    return sums, statistics.median(steps[untimed:] or steps[-1:]) * trainer.steps + judging


def _counting(terms: Sequence[Term], epoch: int, epochs: int) -> float:
    """How many terms with a weight count in an epoch, those that rise or fall in part."""
    return sum(term.schedule(epoch, epochs) for term in terms if term.share is None)


def _fullest(terms: Sequence[Term], epochs: int) -> int:
    """Finds the first epoch in which most terms count.

    Schedules are straight lines between a few epochs, beside one of which it is.
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
    whole = _duration(recipe.epochs * sum(seconds.values()))
    return Finding(
        "time", f"an epoch takes about {each} here; {recipe.epochs} epochs of each: {whole} a seed"
    )


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved(device)
        whole = torch.cuda.get_device_properties(device).total_memory
        return f"{used / 2**30:.1f} of {whole / 2**30:.0f} GB of the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / 2**30:.1f} GB with all data"


def _some(images: Images, count: int) -> Images:
    """Some images, always the same, chosen by chance."""
    order = torch.randperm(len(images.target), generator=torch.Generator().manual_seed(0))
    return Subset(images, order[:count].sort().values)


def _spaced(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())


def _settings(section: str, mean: Sequence[float], std: Sequence[float]) -> str:
    """How mean and std are given on the command line."""
    return f"'{section}.mean={_listed(mean)}' '{section}.std={_listed(std)}'"


def _listed(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"
