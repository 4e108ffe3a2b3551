"""What all vectorizations share: units of length, and checks of their parameters."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.topology.gradient import in_units
from topkd.topology.rips import Diagrams

MARGIN = 3  # cells or steps beyond what a vectorization was fitted on

Unit = Literal["none", "mean", "median", "max"]


def length_unit(diagrams: Diagrams, unit: Unit = "mean") -> Tensor:
    """Computes the unit that the lengths of each cloud are told in: a statistic of its own deaths.

    Whatever is told in such a unit is the same for a cloud and for the same cloud twice as large,
    so that networks of different widths compare. In H0 the deaths are the edges of the minimum
    spanning tree; those of length zero count. Loops are few and their deaths jump, so their births
    and deaths are better told in units of H0, as in the example.

    Args:
        diagrams: Of one dimension.
        unit: Which statistic; "none" is 1.

    Returns:
        One length for each cloud, (clouds); 1 where the statistic is 0, of points that coincide or
        of no bars. It has a gradient.

    Examples:
        >>> from topkd.topology import rips
        >>> points = torch.randn(5, 30, 2, generator=torch.Generator().manual_seed(0))
        >>> both = rips(points, max_dim=1)
        >>> loops = both.scaled(1 / length_unit(both.of(0), "median")).of(1)
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")
    there, deaths = diagrams.mask, diagrams.deaths
    deaths, count = deaths.where(there, 0), there.sum(-1)
    if unit == "none":
        return torch.ones_like(count, dtype=deaths.dtype)
    if unit == "mean":
        statistic = deaths.sum(-1) / count.clamp(min=1)
    elif unit == "max":
        statistic = F.pad(deaths, (0, 1)).amax(-1)  # one more, as there may be none
    else:
        ordered = F.pad(deaths.masked_fill(~there, math.inf).sort(-1).values, (0, 1))
        middle = torch.stack([(count - 1).clamp(min=0) // 2, count // 2], dim=-1)
        statistic = ordered.gather(-1, middle).mean(-1).where(count > 0, 0)
    return statistic.where(statistic > 0, 1)


def told_in(diagrams: Diagrams, unit: Tensor) -> Diagrams:
    """Divides births and deaths by a unit of each cloud, as :func:`in_units` does."""
    unit = unit[..., None]
    births, deaths = in_units(diagrams.births, unit), in_units(diagrams.deaths, unit)
    return replace(diagrams, births=births, deaths=deaths)


def measured(diagrams: Diagrams, unit: Unit, *, detach_unit: bool) -> tuple[Tensor, Tensor]:
    """Births and deaths in units of their cloud, both 0 for what is no bar: padding, length zero.

    Raises:
        ValueError: If there are bars of more than one dimension.
    """
    dimensions = [d for d, size in enumerate(diagrams.sizes) if size > 0]
    if len(dimensions) > 1:
        raise ValueError(
            f"these diagrams have bars of dimensions {dimensions}, and one is described at a time: "
            "choose it by .of(dimension)"
        )
    bars = diagrams.mask & (diagrams.deaths > diagrams.births)
    births, deaths = diagrams.births.where(bars, 0), diagrams.deaths.where(bars, 0)
    if unit == "none":
        return births, deaths
    length = length_unit(diagrams, unit)[..., None]
    if detach_unit:
        length = length.detach()
    return in_units(births, length), in_units(deaths, length)


def detached(diagrams: Diagrams) -> Diagrams:
    """The same diagrams without gradient, in float64, to fit parameters on."""
    return replace(
        diagrams, births=diagrams.births.detach().double(), deaths=diagrams.deaths.detach().double()
    )


def check_positive(vectorization: object, *names: str) -> None:
    """Refuses parameters that are not positive and finite."""
    for name in names:
        value = getattr(vectorization, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive, got {value}")


def check_not_negative(vectorization: object, name: str) -> None:
    """Refuses a parameter that is negative or not finite."""
    value = getattr(vectorization, name)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be 0 or more, got {value}")


def check_range(vectorization: object, name: str) -> None:
    """Refuses a parameter that is not two finite numbers, the lower first."""
    low, high = getattr(vectorization, name)
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"{name} must be a range, low then high, got {(low, high)}")


def check_choice(vectorization: object, name: str, known: Collection[str]) -> None:
    """Refuses a parameter that is none of the names that are known."""
    value = getattr(vectorization, name)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
