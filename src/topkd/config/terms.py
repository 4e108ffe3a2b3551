"""Terms of an objective: weight or share, schedule, taps, and the names of their sums."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainSerializer, model_validator

from topkd.config.sections import OpenSection
from topkd.config.validation import Section

IMPLIED = "ce"  # loss that the name of a run leaves out beside others


class View(Section):
    """Taps of one network for one term. They replace the network's default taps."""

    maps: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    preactivations: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    embedding: str | None = None
    """Tap of the embedding; a feature map is average-pooled per channel."""


class Taps(Section):
    """Taps of both networks for one term."""

    student: View = View()
    teacher: View = View()


def _moment(value: float) -> float:
    if 0 < value < 1:
        return value
    if value < 1 or value != int(value):
        raise ValueError(
            f"must be a whole number of epochs, or a fraction of them in (0, 1), got {value:g}"
        )
    return int(value)


# Whole numbers are stored as such, so that files and hashes of recipes do not change.
Moment = Annotated[float, AfterValidator(_moment), PlainSerializer(_moment, return_type=Any)]
"""An epoch, counted from 1, or a fraction of all epochs."""


class Term(OpenSection):
    """One term of the objective; other keys are options of the named loss."""

    name: str
    """Name of the loss."""
    label: str | None = None
    """Title in results. Defaults to the name. Two terms with the same loss need labels."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the term."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Replaces the weight: target fraction of the sum of the gradient norms of all terms, measured
    at the student's embedding or, if a term reads other features, at the backbone weights."""
    start: Moment = 1
    """First epoch in which the term is active, or the fraction of the epochs that precedes it."""
    stop: Moment | None = None
    """Last epoch in which the term is active, or the fraction of the epochs that it ends."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Number of epochs, from ``start``, in which the weight increases linearly from 0."""
    decay: Annotated[int, Field(ge=0)] = 0
    """Number of epochs, up to ``stop``, in which the weight decreases linearly to 0."""
    batch: Literal["local", "gathered"] = "local"
    """With several processes: compute the loss per process, or on the batches of all."""
    taps: Taps = Taps()

    @model_validator(mode="after")
    def _weighs_in_one_way(self) -> Term:
        if self.share is not None and "weight" in self.model_fields_set and self.weight != 1:
            raise ValueError("share replaces weight; set only one of them")
        are_alike = self.stop is not None and (self.stop < 1) == (self.start < 1)
        if self.stop is not None and are_alike and self.stop < self.start:
            raise ValueError(f"stop ({self.stop}) is before start ({self.start})")
        return self

    @property
    def title(self) -> str:
        """Title of the term in results."""
        return self.label or self.name

    def span(self, epochs: int) -> tuple[int, int]:
        """Returns the first and the last epoch in which the term is active.

        A fraction is rounded to whole epochs, with at least one epoch before and after it. The
        first epoch is after the last if the term is never active.

        Examples:
            >>> Term(name="fsp", stop=0.125).span(240), Term(name="ce", start=0.125).span(240)
            ((1, 30), (31, 240))
        """

        def whole(moment: float, after: int) -> int:
            if moment >= 1:
                return int(moment)
            return max(1, min(math.floor(moment * epochs + 0.5), epochs - 1)) + after

        last = epochs if self.stop is None else min(whole(self.stop, after=0), epochs)
        return whole(self.start, after=1), last

    def resolved(self, epochs: int) -> Term:
        """Replaces fractions of the epochs by the epochs that they give."""
        first, last = self.span(epochs)
        update = {"start": first} if self.start < 1 else {}
        if self.stop is not None and self.stop < 1:
            update["stop"] = last
        return self.model_copy(update=update)

    def schedule(self, epoch: int, epochs: int) -> float:
        """Returns the factor of the weight in an epoch, counted from 1.

        Examples:
            >>> term = Term(name="kd", start=2, stop=5, warmup=2, decay=2)
            >>> [term.schedule(epoch, epochs=6) for epoch in range(1, 7)]
            [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
        """
        first, last = self.span(epochs)
        if not first <= epoch <= last:
            return 0.0
        rise = (epoch - first + 1) / max(1, self.warmup)
        fall = (last - epoch + 1) / max(1, self.decay)
        return min(1.0, rise, fall)

    def turns(self, epochs: int) -> set[int]:
        """Returns the epochs of a run in which the slope of the schedule may change."""
        first, last = self.span(epochs)
        rise, fall = max(1, self.warmup), max(1, self.decay)
        meeting = ((last + 1) * rise + (first - 1) * fall) // (rise + fall)
        turns = {first, first + rise, last, last - fall, meeting}
        near = {turn + step for turn in turns for step in (-1, 0, 1)}
        return {epoch for epoch in near if 1 <= epoch <= epochs}

    def check_schedule(self, epochs: int) -> None:
        """Checks that the term is active in a run of so many epochs.

        Raises:
            ValueError: If it is never active.
        """
        first, last = self.span(epochs)
        if first > last:
            given = self.model_dump(include={"start", "stop"}, exclude_defaults=True)
            limits = ", ".join(f"{key} {value}" for key, value in given.items())
            raise ValueError(
                f"{self.title} is never active in {epochs} epochs ({limits}); "
                "use a fraction of the epochs, or more epochs"
            )

    def schedule_warning(self, epochs: int) -> str:
        """Describes a warm-up or decay that never lets the term reach its weight, if any."""
        first, last = self.span(epochs)
        peak = max(self.schedule(epoch, epochs) for epoch in self.turns(epochs))
        if peak == 1:
            return ""
        given = self.model_dump(include={"warmup", "decay"}, exclude_defaults=True)
        limits = " and ".join(f"{key} {value}" for key, value in given.items())
        return (
            f"{self.title} reaches {peak:.0%} of its weight: {limits} does not fit into its "
            f"epochs, {first} to {last}"
        )


def variant_name(losses: Sequence[Term]) -> str:
    """Names runs after their losses; cross-entropy is left out beside other losses.

    Examples:
        >>> variant_name([Term(name="ce"), Term(name="kd"), Term(name="topkd")])
        'kd+topkd'
    """
    titles = [term.title for term in losses if term.title != IMPLIED] or [IMPLIED]
    return re.sub(r"[^\w.+-]+", "-", "+".join(titles))[:100]
