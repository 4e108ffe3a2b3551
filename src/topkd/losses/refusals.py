"""What losses refuse: options out of range, and features that cannot be compared."""

import math
from typing import Any, TypeVar, get_args

from torch import Tensor

Value = TypeVar("Value")


def positive(name: str, value: float) -> float:
    """Passes on an option that must be above 0 and finite.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """Passes on an option that must be 0 or above, and finite.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def one_of(name: str, value: Value, choices: Any) -> Value:
    """Passes on an option that must be one of the values of a ``Literal``.

    Raises:
        ValueError: If it is not; the message names the option and the values.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be {' or '.join(map(str, get_args(choices)))}, got {value}")
    return value


def check_shapes(
    what: str, student: Tensor, teacher: Tensor, dimensions: int | None = None
) -> None:
    """Checks that what two networks made of a batch has one shape.

    Args:
        what: Is compared, for the message.
        student: Of the student.
        teacher: Of the teacher.
        dimensions: How many have to agree, from the first on; all if not told.

    Raises:
        ValueError: If they differ.
    """
    if student.shape[:dimensions] != teacher.shape[:dimensions]:
        raise ValueError(
            f"{what} differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )
