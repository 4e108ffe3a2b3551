"""Preflight checks: tests a recipe for a minute before training."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from topkd.config.recipe import Recipe
from topkd.training.experiment import Experiment
from topkd.training.preflight.data import check_data
from topkd.training.preflight.finding import Finding as Finding
from topkd.training.preflight.runs import check_run
from topkd.training.preflight.teacher import check_teacher


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
        findings = [*check_data(experiment)]
        advance(1, "evaluating the teacher")
        found, is_there = check_teacher(experiment)
        findings += found
        if not is_there:
            return findings
        variants = recipe.variants if len(experiment.data.train.target) >= recipe.batch_size else ()
        for variant in variants:
            advance(1, f"training a few steps of {variant}")
            found, epoch = check_run(experiment, variant)
            findings += found
            if epoch is not None:
                seconds[variant] = epoch
    if seconds:
        findings += [_time(recipe, seconds), Finding("memory", _memory(experiment.device.device))]
    faults = experiment.data.faults.lines()
    return findings + [Finding("data", line, "warning", "repair the files") for line in faults]


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
