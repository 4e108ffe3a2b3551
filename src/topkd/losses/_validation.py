"""Validation of options, and of features that are compared."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

Value = TypeVar("Value")
Number = TypeVar("Number", float, Tensor, float | Tensor)

LOGITS, EMBEDDINGS, MAPS = "(n, classes)", "(n, d)", "(n, c, h, w)"
# Above it, float32 loses the value of losses that multiply by T²: KD has an error of about 5e-8 T².
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0
MAX_EXPONENT = 1e6  # of probabilities: the inverse of a temperature


def positive(name: str, value: Number) -> Number:
    """Returns an option that must be positive and finite.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    if _is_readable(value) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {_number(value)}")
    return value


def temperature(value: Number, name: str = "temperature") -> Number:
    """Returns a temperature, which must be between 1e-6 and 100.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    return _between(name, value, MIN_TEMPERATURE, MAX_TEMPERATURE)


def exponent(name: str, value: float) -> float:
    """Returns an exponent of probabilities, which must be between 1e-6 and 1e6.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    return _between(name, value, 1 / MAX_EXPONENT, MAX_EXPONENT)


def _between(name: str, value: Number, lowest: float, highest: float) -> Number:
    positive(name, value)
    if _is_readable(value) and not lowest <= value <= highest:
        raise ValueError(f"{name} must be between {lowest:g} and {highest:g}, got {_number(value)}")
    return value


def temperatures(values: Sequence[float]) -> tuple[float, ...]:
    """Returns temperatures, of which there must be at least one; each is checked.

    Raises:
        ValueError: If there is none, or one of them is out of range.
    """
    if not values:
        raise ValueError("temperatures must be at least one, got ()")
    return tuple(temperature(value, "temperatures") for value in values)


def count(name: str, value: int) -> int:
    """Returns an option that must be a positive integer.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    positive(name, value)
    if isinstance(value, bool) or value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")
    return value


def at_least_one(name: str, value: float, *, finite: bool = True) -> float:
    """Returns an option that must be at least 1.

    Raises:
        ValueError: If it is not, or if it is infinite but must be finite; the message names it.
    """
    if not value >= 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if finite and value == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def skipped(value: int) -> int:
    """Returns a number of skipped stages, which must not be negative.

    Raises:
        ValueError: If it is negative.
    """
    if isinstance(value, bool) or value != int(value):
        raise ValueError(f"skip must be a whole number, got {value}")
    if value < 0:
        raise ValueError(f"skip must not be negative, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """Returns an option that must be nonnegative and finite.

    Raises:
        ValueError: If it is not; the message names the option.
    """
    if value == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def one_of(name: str, value: Value, choices: Any) -> Value:
    """Returns an option that must be one of the values of a ``Literal``.

    Raises:
        ValueError: If it is not; the message names the option and the values.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be {' or '.join(map(str, get_args(choices)))}, got {value}")
    return value


def refuse_unused(options: Mapping[str, Any], unused: Iterable[str], setting: str) -> None:
    """Refuses options that have no effect with another setting, whatever their value.

    Args:
        options: The options that were given.
        unused: Names of the options without effect.
        setting: The setting, as in a recipe.

    Raises:
        ValueError: If one of them was given; the message names the option and the setting.
    """
    for name in unused:
        if name in options:
            raise ValueError(f"{name} has no effect with {setting}; leave it out")


def check_shapes(
    what: str, student: Tensor, teacher: Tensor, dimensions: int | None = None, form: str = ""
) -> None:
    """Checks that two tensors are floating-point and agree in shape.

    Args:
        what: Name of the compared quantity, for the message.
        student: Tensor of the student.
        teacher: Tensor of the teacher.
        dimensions: Number of leading dimensions that must agree. Defaults to all.
        form: Required dimensions, such as ``(n, classes)``. Defaults to any.

    Raises:
        ValueError: If the shapes differ, or a tensor is not floating-point, is empty or has
            another number of dimensions.
    """
    for whose, tensor in (("student", student), ("teacher", teacher)):
        check_floats(what, tensor, form, f" of the {whose}")
    if student.shape[:dimensions] != teacher.shape[:dimensions]:
        raise ValueError(
            f"{what} differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )


def check_floats(what: str, tensor: Tensor, form: str = "", whose: str = "") -> None:
    """Checks that a tensor is floating-point, nonempty and of the required number of dimensions.

    Args:
        what: Name of the tensor, for the message.
        tensor: Any tensor.
        form: Required dimensions, such as ``(n, classes)``. Defaults to any.
        whose: Suffix of the message, such as `` of the student``.

    Raises:
        ValueError: If it is not.
    """
    has_form = not form or tensor.ndim == form.count(",") + 1
    if not has_form or not tensor.is_floating_point() or 0 in tensor.shape:
        raise ValueError(
            f"{what} must be floats{' ' if form else ''}{form}, and not empty, "
            f"got {tensor.dtype} {tuple(tensor.shape)}{whose}"
        )


def check_target(target: Tensor, logits: Tensor) -> None:
    """Checks that labels are integers (n,) within the classes of the logits (n, classes).

    Raises:
        ValueError: If they are not, or if there are fewer than two classes.
    """
    n, classes = logits.shape
    is_integer = not (
        target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    )
    if target.shape != (n,) or not is_integer:
        raise ValueError(
            f"labels must be whole numbers ({n},), got {target.dtype} {tuple(target.shape)}"
        )
    if classes < 2:
        raise ValueError(f"logits must have at least two classes, got {tuple(logits.shape)}")
    if _is_readable(target):
        invalid = target[(target < 0) | (target >= classes)].tolist()
        if invalid:
            raise ValueError(f"labels must be 0 to {classes - 1}, got {invalid[0]}")


def _is_readable(value: object) -> bool:
    """Whether a value can be read; values of tensors cannot in a compiled graph."""
    return not (isinstance(value, Tensor) and torch.compiler.is_compiling())


def _number(value: object) -> object:
    return value.item() if isinstance(value, Tensor) else value
