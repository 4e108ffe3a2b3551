"""What is measured in training: means over an epoch, and how they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Sums:
    """Running means over the steps of an epoch, kept on the device."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Adds one value."""
        self.totals[name] = self.totals.get(name, 0) + value.detach()
        self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, prefix: str) -> dict[str, float]:
        """Computes the means of the names that begin with ``prefix``, which is taken off."""
        return {
            name.removeprefix(prefix): (total / self.counts[name]).item()
            for name, total in self.totals.items()
            if name.startswith(prefix)
        }


def summary(entry: Mapping[str, Any]) -> str:
    """Tells an epoch in a line."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in entry["losses"].items())
    accuracies = ", ".join(
        f"{key.removesuffix('_top1')} {entry[key]:.2f} %"
        for key in sorted(entry)
        if key.endswith("_top1")
    )
    return f"{accuracies}, {losses}, {entry['seconds']:.1f} s"


def tensorboard(folder: Path) -> Any:
    """Opens a TensorBoard log where the extra is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def write_scalars(board: Any, entry: Mapping[str, Any]) -> None:
    """Writes the numbers of an epoch to a TensorBoard log."""
    for key, value in entry.items():
        if isinstance(value, list):  # of warnings
            continue
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, number in parts:
            board.add_scalar(f"{key}/{name}" if name else key, number, entry["epoch"])
    board.flush()  # raises here what its thread met
