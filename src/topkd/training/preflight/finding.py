"""Findings of preflight checks, and how they are phrased."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from topkd.data import Images, Subset

Verdict = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report of ``topkd doctor``."""

    part: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""
    """Suggested change."""


def random_subset(images: Images, count: int) -> Images:
    """Returns a fixed random subset of images."""
    order = torch.randperm(len(images.target), generator=torch.Generator().manual_seed(0))
    return Subset(images, order[:count].sort().values)


def per_channel(values: Tensor) -> str:
    """Formats one value per channel."""
    return " ".join(f"{value:.2f}" for value in values.tolist())


def as_changes(section: str, mean: Sequence[float], std: Sequence[float]) -> str:
    """Formats mean and std as changes on the command line."""
    return f"'{section}.mean={_listed(mean)}' '{section}.std={_listed(std)}'"


def _listed(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"
