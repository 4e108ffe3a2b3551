"""Training metrics: means over an epoch, summaries and experiment trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from topkd.config.validation import near


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
        """Computes the means of names that start with ``prefix``, and strips the prefix."""
        return {
            name.removeprefix(prefix): (total / self.counts[name]).item()
            for name, total in self.totals.items()
            if name.startswith(prefix)
        }


def summary(entry: Mapping[str, Any]) -> str:
    """Summarizes an epoch in a line."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in entry["losses"].items())
    accuracies = ", ".join(
        f"{key.removesuffix('_top1')} {entry[key]:.2f} %"
        for key in sorted(entry)
        if key.endswith("_top1")
    )
    return f"{accuracies}, {losses}, {entry['seconds']:.1f} s"


class Trackers:
    """Experiment trackers of Accelerate: TensorBoard, W&B, MLflow, Trackio and others.

    Args:
        names: Names of trackers. ``auto`` is TensorBoard if it is installed.
        folder: Folder of the run, ``RECIPE/VARIANT/seedN``, which also names the run. Trackers
            write their files there.

    Raises:
        ValueError: If a tracker does not exist.
        ModuleNotFoundError: If its package is not installed.

    References:
        https://huggingface.co/docs/accelerate/usage_guides/tracking
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        wanted = (_default() if name == "auto" else name for name in names)
        self._open = [_start(name, folder) for name in dict.fromkeys(wanted) if name is not None]

    def log(self, entry: Mapping[str, Any]) -> None:
        """Logs the metrics of an epoch."""
        values: dict[str, float] = {}
        for key, value in entry.items():
            if isinstance(value, Mapping):
                values |= {f"{key}/{name}": number for name, number in value.items()}
            elif not isinstance(value, list | str):  # warnings, place of the gradients
                values[key] = value
        for tracker in self._open:
            tracker.log(values, step=entry["epoch"])

    def finish(self) -> None:
        """Ends the run in every tracker."""
        for tracker in self._open:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Checks the names of trackers.

    Raises:
        ValueError: If a tracker does not exist.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = ["auto", *LOGGER_TYPE_TO_CLASS]
    for name in names:
        if name not in known:
            raise ValueError(f"--track: there is no tracker {name!r}{near(name, known)}")


def _default() -> str | None:
    return "tensorboard" if importlib.util.find_spec("tensorboard") else None


def _start(name: str, folder: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    check_trackers([name])
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    title = "/".join(folder.parts[-3:])
    try:
        if name == "tensorboard":
            tracker = kind("tensorboard", logging_dir=folder)
        elif kind.requires_logging_directory:
            tracker = kind(title, logging_dir=folder)
        else:
            tracker = kind(title)
        if hasattr(tracker, "start"):  # older versions start in the constructor
            tracker.start()
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the tracker {name} needs its package: pip install {name}", name=name
        ) from error
    return tracker
