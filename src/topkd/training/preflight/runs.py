"""Preflight checks of the runs: losses, gradients, speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch

from topkd._io.progress import Progress
from topkd.config.terms import Term
from topkd.data import training_batches
from topkd.evaluation import metrics
from topkd.features import FeatureExtractor
from topkd.losses.base import LossTerm
from topkd.topology.approximation import MIN_R2
from topkd.training.experiment import Experiment
from topkd.training.objective import measured_at, warnings
from topkd.training.optim import learning_rate
from topkd.training.preflight.finding import Finding, random_subset
from topkd.training.tracking import Sums
from topkd.training.trainer import Trainer

WARM = 3  # untimed training steps, in which gradients are measured
TIMED = 20  # timed training steps
PATIENCE = 30.0  # time limit of the timed steps, in seconds


class _NeedsFitError(Exception):
    """Raised when a loss starts to fit to the teacher."""


class _NoFit(Progress):
    """Raises when a loss starts to fit, which acquires a lock or shows a bar."""

    def alone(self, path: Path) -> NoReturn:
        raise _NeedsFitError

    def bar(self, title: str, total: int, unit: str) -> NoReturn:
        raise _NeedsFitError


def check_run(experiment: Experiment, variant: str) -> tuple[list[Finding], float | None]:
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
    advice = "shorten the warm-up or the decay, or train for more epochs"
    for line in experiment.recipe.schedule_warnings(variant):
        findings.append(Finding(part, line, "warning", advice))
    weighted_titles = {w.title for w in losses if w.settings.weight or w.settings.share}
    shares = {t: share for t, share in sums.means("share/").items() if t in weighted_titles}
    epochs = experiment.recipe.epochs
    place = measured_at(losses, _fullest([w.settings for w in losses], epochs), epochs)
    for line in warnings(shares, sums.means("cosine/"), place):
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
    starts = {term.span(recipe.epochs)[0] for term in terms}
    counting = {epoch for epoch in starts if _counting(terms, epoch, recipe.epochs)}
    others = sorted(counting - {fullest})
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
    images = random_subset(data.test, 500)
    start = time.perf_counter()
    with device.autocast():
        metrics.predict(student.eval(), images, device.device)
    evaluation = (time.perf_counter() - start) * len(data.test.target) / len(images.target)
    seconds = statistics.median(steps[untimed:] or steps[-1:]) * trainer.steps
    evaluations = math.ceil(recipe.epochs / recipe.evaluate_every)
    return sums, seconds + evaluation * evaluations / recipe.epochs


def _counting(terms: Sequence[Term], epoch: int, epochs: int) -> float:
    """Sums the schedules of the terms with a weight, i.e. counts the active terms."""
    return sum(term.schedule(epoch, epochs) for term in terms if term.share is None)


def _fullest(terms: Sequence[Term], epochs: int) -> int:
    """Finds the first epoch with the most active terms.

    Schedules are piecewise linear, so the maximum lies next to one of their breakpoints.
    """
    turns = {1}.union(*(term.turns(epochs) for term in terms))
    return max(sorted(turns), key=lambda epoch: _counting(terms, epoch, epochs))
