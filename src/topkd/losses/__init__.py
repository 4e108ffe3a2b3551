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


LOSSES: Mapping[str, Entry] = {
    "ce": Entry(CrossEntropy, "logits with the labels", "-"),
    "kd": Entry(Distillation, "softened predictions", "Hinton et al. 2014"),
    "topkd": Entry(TopKD, "persistence of the embeddings", "Kim et al., ICML 2024"),
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
