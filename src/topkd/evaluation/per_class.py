"""Accuracy of every class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

PER_CLASS = "per_class"  # key in result.json and name in the recipe's `evaluation`
MOST_CLASSES = 200  # results of more classes are not stored


def per_class(logits: Tensor, target: Tensor, classes: Sequence[str]) -> dict[str, Any] | None:
    """Computes the accuracy of every class and the confusion matrix.

    Args:
        logits: The outputs of a network, (n, classes).
        target: Labels, (n,).
        classes: Names of the classes. Their numbers are used if two names are equal.

    Returns:
        ``accuracy``: class -> percentage of its images that are classified correctly;
        ``confusion``: class -> predicted class -> number of images, without zeros. Classes without
        an image are left out. None if there are more than 200 classes.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
        >>> per_class(logits, torch.tensor([0, 0, 1]), ["cat", "dog"])["confusion"]
        {'cat': {'cat': 1, 'dog': 1}, 'dog': {'dog': 1}}
    """
    number = len(classes)
    if number > MOST_CLASSES:
        return None
    names = list(classes) if len(set(classes)) == number else [str(c) for c in range(number)]
    pairs = target * number + logits.argmax(1)
    counts = pairs.bincount(minlength=number**2).view(number, number).tolist()
    rows = {label: row for label, row in enumerate(counts) if any(row)}
    return {
        "accuracy": {names[label]: 100 * row[label] / sum(row) for label, row in rows.items()},
        "confusion": {
            names[label]: {name: n for name, n in zip(names, row, strict=True) if n}
            for label, row in rows.items()
        },
    }
