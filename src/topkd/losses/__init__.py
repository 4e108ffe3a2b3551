"""The losses, by the name that recipes use."""

from collections.abc import Mapping
from dataclasses import dataclass

from topkd.losses.base import Loss, Source
from topkd.losses.logits import CrossEntropy, Distillation, distillation
from topkd.losses.topology import TopKD


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue."""

    loss: type[Loss]
    compares: str
    paper: str
    url: str
    cost: str
    """How work grows with n samples, d numbers of each, c classes; with what a loss brings."""
    zero: bool = True
    """Whether it is 0 for a student that equals its teacher."""


LOSSES: Mapping[str, Entry] = {
    "ce": Entry(
        CrossEntropy,
        "logits with the labels",
        "Szegedy et al., CVPR 2016",
        "https://arxiv.org/abs/1512.00567",
        "n c",
        zero=False,
    ),
    "kd": Entry(
        Distillation,
        "softened predictions",
        "Hinton et al. 2014",
        "https://arxiv.org/abs/1503.02531",
        "n c",
    ),
    "topkd": Entry(
        TopKD,
        "persistence of the embeddings",
        "Kim et al., ICML 2024",
        "https://proceedings.mlr.press/v235/kim24aj.html",
        "n² d",
    ),
}
"""Name -> class, what it compares and its paper."""

__all__ = [
    "LOSSES",
    "CrossEntropy",
    "Distillation",
    "Entry",
    "Loss",
    "Source",
    "TopKD",
    "distillation",
]
