"""Executors, which run the jobs of a study, registered by the name that ``--on`` takes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from topkd.config.validation import near
from topkd.studies.executors.base import Ended, Executor
from topkd.studies.executors.local import Local
from topkd.studies.executors.ray import Ray
from topkd.studies.executors.slurm import Slurm

EXECUTORS: Mapping[str, Callable[..., Executor]] = {"local": Local, "ray": Ray, "slurm": Slurm}
"""Name -> class; its arguments are the options of ``topkd study run``."""


def create(name: str, options: Mapping[str, Any]) -> Executor:
    """Creates an executor.

    Args:
        name: Name in :data:`EXECUTORS`.
        options: Its arguments; those that are None keep their defaults.

    Raises:
        ValueError: If there is no such executor, it does not take an option, or a value is invalid.

    Examples:
        >>> create("local", {"jobs": 2, "gpus": None}).jobs
        2
    """
    if name not in EXECUTORS:
        raise ValueError(f"--on: there is no executor {name!r}{near(name, list(EXECUTORS))}")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        takers = [each for each, made in EXECUTORS.items() if option in _options(made)]
        if name not in takers:
            raise ValueError(f"--{option} is for --on {' or '.join(takers)}, not for --on {name}")
    return EXECUTORS[name](**given)


def _options(executor: Callable[..., Executor]) -> list[str]:
    return list(inspect.signature(executor).parameters)


__all__ = ["EXECUTORS", "Ended", "Executor", "Local", "Ray", "Slurm", "create"]
