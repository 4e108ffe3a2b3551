"""Two clouds of corresponding points, and lengths of the same edges in both."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from topkd.topology._validation import check_choice
from topkd.topology.gradient import bounded_divide
from topkd.topology.lengths import edge_lengths
from topkd.topology.scaling import DistanceScale, distance_scale


class MatchedClouds(NamedTuple):
    """Batches of student and teacher clouds with their length scales."""

    student: Tensor  # (clouds, n, d)
    teacher: Tensor
    student_scale: Tensor  # (clouds, 1)
    teacher_scale: Tensor
    is_single: bool  # whether the input had no batch axis

    def edge_lengths(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled lengths of edges (clouds, k, 2) in both clouds."""
        return self.scaled(edge_lengths(self.student, edges), edge_lengths(self.teacher, edges))

    def scaled(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Divides lengths (clouds, k) of both clouds by their scales."""
        return (
            bounded_divide(student, self.student_scale),
            bounded_divide(teacher, self.teacher_scale),
        )

    def length_difference(self, edges: Tensor) -> Tensor:
        """Scaled lengths of edges (clouds, k, 2) in the student minus those in the teacher."""
        student, teacher = self.edge_lengths(edges)
        return student - teacher

    def unbatched(self, values: Tensor) -> Tensor:
        """Removes the batch axis if the input had none."""
        return values[0] if self.is_single else values


def match_clouds(
    student: Tensor,
    teacher: Tensor,
    scale: DistanceScale,
    teacher_scale: DistanceScale,
    detach_scale: bool,
) -> MatchedClouds:
    """Validates two clouds, or two batches of clouds, and computes their length scales.

    Raises:
        ValueError: If they are not finite floats with equal numbers of points, or a scale is not a
            statistic of distances.
    """
    check_choice("scale", scale, get_args(DistanceScale))
    check_choice("teacher_scale", teacher_scale, get_args(DistanceScale))
    _check_points("student", student)
    _check_points("teacher", teacher)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"clouds differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "they must have the same points and may differ only in width"
        )
    is_single = student.ndim == 2
    student, teacher = (_batched(points, is_single) for points in (student, teacher))
    return MatchedClouds(
        student=student,
        teacher=teacher,
        student_scale=distance_scale(student, scale, detach=detach_scale),
        teacher_scale=distance_scale(teacher, teacher_scale, detach=detach_scale),
        is_single=is_single,
    )


def _check_points(name: str, points: Tensor) -> None:
    if points.ndim not in (2, 3) or not points.is_floating_point():
        raise ValueError(
            f"{name} must be floats (n, d) or (clouds, n, d), "
            f"got {points.dtype} {tuple(points.shape)}"
        )
    if points.shape[-2] == 0:
        raise ValueError(f"{name}: a cloud needs at least one point, got {tuple(points.shape)}")
    if torch.compiler.is_compiling():  # rips checks values too, but cannot name the network
        return
    bad = ~points.detach().isfinite().all(-1)
    if bad.any():
        *cloud, point = bad.nonzero()[0].tolist()
        where = f"cloud {cloud[0]}, point {point}" if cloud else f"point {point}"
        raise ValueError(f"{name}, {where}: a coordinate is NaN or infinite")


def _batched(points: Tensor, is_single: bool) -> Tensor:
    points = points[None] if is_single else points
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
