"""What losses refuse: options out of range, and features that cannot be compared."""

import math
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

Value = TypeVar("Value")
Number = TypeVar("Number", float, Tensor, float | Tensor)

LOGITS, EMBEDDINGS, MAPS = "(n, classes)", "(n, d)", "(n, c, h, w)"
WIDEST = 1e6  # of temperatures: their squares, and one over them, have to be numbers


def positive(name: str, value: Number) -> Number:
    """Passes on an option that must be above 0 and finite.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    if _looked_at(value) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {_told(value)}")
    return value


def temperature(value: Number, name: str = "temperature") -> Number:
    """Passes on a temperature: it must be positive, and neither tiny nor huge.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    positive(name, value)
    if _looked_at(value) and not 1 / WIDEST <= value <= WIDEST:
        raise ValueError(
            f"{name} must be between {1 / WIDEST:g} and {WIDEST:g}, got {_told(value)}"
        )
    return value


def count(name: str, value: int) -> int:
    """Passes on a number of things, of which there must be one at least.

    Raises:
        ValueError: If it is below 1 or no whole number; the message names the option.
    """
    positive(name, value)
    if isinstance(value, bool) or value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")
    return value


def at_least_one(name: str, value: float, *, finite: bool = True) -> float:
    """Passes on an exponent, which must be 1 or above.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    if not value >= 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if finite and value == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def skipped(value: int) -> int:
    """Passes on a number of stages to leave out, 0 or more.

    Raises:
        ValueError: If it is negative.
    """
    if value < 0:
        raise ValueError(f"skip must not be negative, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """Passes on an option that must be 0 or above, and finite.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    if value == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    if not value >= 0:
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
    what: str, student: Tensor, teacher: Tensor, dimensions: int | None = None, form: str = ""
) -> None:
    """Checks that what two networks made of a batch are floats of one shape.

    Args:
        what: Is compared, for the message.
        student: Of the student.
        teacher: Of the teacher.
        dimensions: How many have to agree, from the first on; all if not told.
        form: Which dimensions there are, such as ``(n, classes)``; any if not told.

    Raises:
        ValueError: If they differ, are no floats, have other dimensions, or are empty.
    """
    for whose, tensor in (("student", student), ("teacher", teacher)):
        check_floats(what, tensor, form, f" of the {whose}")
    if student.shape[:dimensions] != teacher.shape[:dimensions]:
        raise ValueError(
            f"{what} differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )


def check_floats(what: str, tensor: Tensor, form: str = "", whose: str = "") -> None:
    """Checks that a tensor holds floats, of a number of dimensions and not none at all.

    Args:
        what: They are, for the message.
        tensor: Any.
        form: Which dimensions there are; any if not told.
        whose: Of whom they are, for the message.

    Raises:
        ValueError: If it does not.
    """
    right = not form or tensor.ndim == form.count(",") + 1
    if not right or not tensor.is_floating_point() or 0 in tensor.shape:
        raise ValueError(
            f"{what} must be floats{' ' if form else ''}{form}, and not empty, "
            f"got {tensor.dtype} {tuple(tensor.shape)}{whose}"
        )


def check_target(target: Tensor, logits: Tensor) -> None:
    """Checks that labels are those of as many images, among the classes of logits.

    Raises:
        ValueError: If they are not.
    """
    n, classes = logits.shape
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if target.shape != (n,) or not whole:
        raise ValueError(
            f"labels must be whole numbers ({n},), got {target.dtype} {tuple(target.shape)}"
        )
    if classes < 2:
        raise ValueError(f"logits must be of two classes at least, got {tuple(logits.shape)}")
    if _looked_at(target):
        wrong = target[(target < 0) | (target >= classes)].tolist()
        if wrong:
            raise ValueError(f"labels must be 0 to {classes - 1}, got {wrong[0]}")


def _looked_at(value: object) -> bool:
    """Whether a number can be asked for: inside a graph that is compiled it cannot."""
    return not (isinstance(value, Tensor) and torch.compiler.is_compiling())


def _told(value: object) -> object:
    return value.item() if isinstance(value, Tensor) else value
