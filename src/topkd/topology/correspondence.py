"""Two clouds of the same points, and the units that their lengths are told in.

===================  ==============================================================================
unit                 is
===================  ==============================================================================
``none``             1, lengths as they are
``mean``             the mean distance; its gradient is spread over all points
``median``           the median distance
``quantile``         the 0.9-quantile of the distances
``matrix_quantile``  the 0.9-quantile of the distance matrix, diagonal and both triangles included
``max``              the greatest distance
===================  ==============================================================================

Always over all pairs of different points, never over the tree alone, whose edges are the shortest
of all and shorter the more points there are. A unit of 0, where points coincide, counts as 1; of
a unit below 0.001 the gradient is bounded, see :func:`~topkd.topology.gradient.in_units`.

The gradient passes through the unit, and so it never changes the scale, on which the loss does not
depend. That of a median, quantile or maximum falls on the one or two pairs that attain it, which
then move much more than all others; that of a mean falls on all points. ``detach_unit=True`` takes
units for constants instead. Then the gradient also pulls at the scale of the features, mostly
towards 0, and does so without end, since the loss stays the same.

All units but ``none`` take O(n² d) time and room for n² distances, for a moment; the graph keeps
none of them.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topkd.topology.gradient import in_units
from topkd.topology.lengths import edge_lengths

Unit = Literal["none", "mean", "median", "quantile", "matrix_quantile", "max"]

LEVELS: dict[Unit, float] = {"median": 0.5, "quantile": 0.9, "matrix_quantile": 0.9, "max": 1.0}


class Pair(NamedTuple):
    """Student and teacher as batches, and their units."""

    student: Tensor  # (clouds, n, d)
    teacher: Tensor
    student_unit: Tensor  # (clouds, 1)
    teacher_unit: Tensor
    alone: bool  # whether there was no batch axis

    def lengths(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths of edges (clouds, k, 2) in both clouds, in their units."""
        return self.told(edge_lengths(self.student, edges), edge_lengths(self.teacher, edges))

    def told(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths (clouds, k) of both clouds, in their units."""
        return in_units(student, self.student_unit), in_units(teacher, self.teacher_unit)

    def gap(self, edges: Tensor) -> Tensor:
        ours, theirs = self.lengths(edges)
        return ours - theirs

    def result(self, values: Tensor) -> Tensor:
        return values[0] if self.alone else values


def paired(
    student: Tensor, teacher: Tensor, unit: Unit, teacher_unit: Unit, detach_unit: bool
) -> Pair:
    """Checks two clouds, or batches of them, and measures their units.

    Raises:
        ValueError: If they are not floats of the same points, or not finite; if a unit is unknown.
    """
    for name in (unit, teacher_unit):
        if name not in get_args(Unit):
            raise ValueError(f"a unit is one of {', '.join(get_args(Unit))}; got {name!r}")
    _check_points("student", student)
    _check_points("teacher", teacher)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"clouds differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "both need the same points, and may differ in width alone"
        )
    alone = student.ndim == 2
    ours, theirs = (_batch(points, alone) for points in (student, teacher))
    return Pair(
        student=ours,
        teacher=theirs,
        student_unit=_unit(ours, unit, detach_unit),
        teacher_unit=_unit(theirs, teacher_unit, detach_unit),
        alone=alone,
    )


def _check_points(name: str, points: Tensor) -> None:
    if points.ndim not in (2, 3) or not points.is_floating_point():
        raise ValueError(
            f"{name} must be floats (n, d) or (clouds, n, d), "
            f"got {points.dtype} {tuple(points.shape)}"
        )
    if points.shape[-2] == 0:
        raise ValueError(f"{name}: a cloud needs at least one point, got {tuple(points.shape)}")
    if torch.compiler.is_compiling():  # rips will see it, but not whose it is
        return
    bad = ~points.detach().isfinite().all(-1)
    if bad.any():
        *cloud, point = bad.nonzero()[0].tolist()
        where = f"cloud {cloud[0]}, point {point}" if cloud else f"point {point}"
        raise ValueError(f"{name}, {where}: a coordinate is NaN or infinite")


def _batch(points: Tensor, alone: bool) -> Tensor:
    points = points[None] if alone else points
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points


def _unit(points: Tensor, unit: Unit, detach: bool) -> Tensor:
    """What the lengths of clouds (clouds, n, d) are divided by, (clouds, 1)."""
    clouds, n, _ = points.shape
    if unit == "none" or n == 1:
        return points.new_ones(clouds, 1)
    points = points.detach() if detach else points
    size = _mean(points) if unit == "mean" else _quantile(points, unit)
    return torch.where(size > 0, size, 1.0)[:, None]


def _mean(points: Tensor) -> Tensor:
    n = points.shape[1]
    # The graph keeps the points alone; the matrix is computed again where a gradient is needed.
    total = checkpoint(
        _total_distance, _wide(points), use_reentrant=False, preserve_rng_state=False
    )
    return (total / (n * (n - 1))).to(points.dtype)


def _total_distance(points: Tensor) -> Tensor:
    return _difference_form(points).sum((1, 2))


def _quantile(points: Tensor, unit: Unit) -> Tensor:
    """Interpolates between the two nearest of the sorted distances, read off the points."""
    n = points.shape[1]
    pairs = n * (n - 1) // 2
    whole = unit == "matrix_quantile"
    last = n * n - 1 if whole else pairs - 1
    place = LEVELS[unit] * last
    low = math.floor(place)
    ranks = [low, min(low + 1, last)]
    if whole:  # the diagonal comes first, and each pair twice
        ranks = [(rank - n) // 2 for rank in ranks]
    i, j = torch.triu_indices(n, n, 1, device=points.device)
    distances = distances_of(points)[:, i, j]
    values = [distances.kthvalue(rank + 1, dim=1, keepdim=True).values for rank in ranks]
    first = torch.stack([(distances == value).byte().argmax(1) for value in values], dim=1)
    lengths = edge_lengths(points, torch.stack([i[first], j[first]], dim=-1))
    return torch.lerp(lengths[:, 0], lengths[:, 1], place - low)


def distances_of(points: Tensor) -> Tensor:
    """Detached distances (clouds, n, n), exactly symmetric, with a diagonal of exact zeros."""
    upper = _difference_form(_wide(points.detach())).triu(1)
    return upper + upper.mT


def _difference_form(points: Tensor) -> Tensor:
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def _wide(points: Tensor) -> Tensor:
    return points if points.device.type == "mps" else points.double()
