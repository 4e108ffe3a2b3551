"""Preflight checks of the data: counts, batches and normalization."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from topkd.training.experiment import Experiment
from topkd.training.preflight.finding import Finding, as_changes, per_channel


def check_data(experiment: Experiment) -> Iterator[Finding]:
    """Counts images and batches, and measures the normalization."""
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
        f"normalized images have mean {per_channel(mean)} and std {per_channel(std)}",
        "ok" if usual else "warning",
        "" if usual else f"for mean 0 and std 1, set {as_changes('data', *measured)}",
    )
