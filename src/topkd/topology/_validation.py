"""Validation of the parameters of vectorizations."""

from __future__ import annotations

import math
from collections.abc import Collection


def check_positive(vectorization: object, *names: str) -> None:
    """Raises ``ValueError`` unless parameters are positive and finite."""
    for name in names:
        value = getattr(vectorization, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive, got {value}")


def check_not_negative(vectorization: object, name: str) -> None:
    """Raises ``ValueError`` if a parameter is negative or not finite."""
    value = getattr(vectorization, name)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be 0 or more, got {value}")


def check_range(vectorization: object, name: str) -> None:
    """Raises ``ValueError`` unless a parameter is a finite range, low before high."""
    low, high = getattr(vectorization, name)
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"{name} must be a range, low then high, got {(low, high)}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ``ValueError`` unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
