"""Paired comparisons of the variants of a study with its baseline."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from topkd.evaluation.statistics import LEVEL, Sample, paired

MOST = 1_000_000  # seeds; a study that would need more is reported as needing this many
Verdict = Literal["better", "worse", "no difference that matters", "undecided"]


@dataclass(frozen=True)
class Comparison:
    """Comparison of a variant with the baseline of its setting."""

    setting: str
    variant: str
    values: Sample
    """Metric of the variant, one value per seed."""
    differences: Sample
    """Metric of the variant minus that of the baseline, one value per common seed."""
    interval: tuple[float, float] | None
    """Simultaneous confidence interval of the mean difference; None if the spread is unknown."""
    p: float | None
    """Adjusted p-value: below 0.05 if and only if the interval excludes 0."""
    verdict: Verdict
    needed: int | None
    """Estimated number of seeds for a decision; None if decided or if the spread is unknown."""
    seeds: tuple[int, ...]
    """The common seeds, in the order of the differences."""


def compare(
    setting: str,
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    *,
    margin: float | None = None,
    higher_is_better: bool = True,
    compared: int | None = None,
) -> list[Comparison]:
    r"""Compares all variants of a setting with its baseline.

    Differences are paired by seed. For m variants, intervals and p-values are those of a paired
    t-test with Bonferroni correction,

    .. math:: \bar d \pm t_{n-1}(1 - \tfrac{0.05}{2m}) \frac{s}{\sqrt n}, \qquad
        p = \min(1, m\, p_t)

    so that all intervals hold simultaneously with 95 % confidence, and an interval excludes 0 if
    and only if its p-value is below 0.05. One seed, or equal differences, leave the spread unknown
    and the comparison undecided.

    Args:
        setting: Name of the setting.
        values: Variant -> seed -> metric.
        baseline: Variant that the others are compared with.
        margin: Smallest difference that matters. An interval within ±margin yields the verdict
            "no difference that matters".
        higher_is_better: Whether higher values of the metric are better.
        compared: The number m of variants, if not all of them are in ``values``, so that a
            selection or an unfinished study is not judged by narrower intervals.

    Returns:
        One comparison for each variant that shares a seed with the baseline.

    Examples:
        >>> found, = compare("s", {"kd": {0: 1, 1: 2, 2: 3}, "new": {0: 3, 1: 4, 2: 5.1}}, "kd")
        >>> found.verdict, round(found.differences.mean, 2)
        ('better', 2.03)
    """
    base = values[baseline]
    pairs = {
        variant: paired(runs, base).difference
        for variant, runs in values.items()
        if variant != baseline and runs.keys() & base.keys()
    }
    count = max(1, compared or len(pairs))
    error = (1 - LEVEL) / count
    found = []
    for variant, differences in pairs.items():
        interval, p = differences.confidence_interval(1 - error), differences.p
        decision = verdict(interval, margin, higher_is_better)
        needed = _needed(differences, error, margin) if decision == "undecided" else None
        corrected = None if p is None else min(1.0, count * p)
        sample = Sample(tuple(values[variant].values()))
        seeds = tuple(sorted(values[variant].keys() & base.keys()))
        found.append(
            Comparison(
                *(setting, variant, sample, differences, interval, corrected, decision, needed),
                seeds,
            )
        )
    return found


def verdict(
    interval: tuple[float, float] | None, margin: float | None, higher_is_better: bool
) -> Verdict:
    """Decides a comparison by its confidence interval, which is None if the spread is unknown."""
    if interval is None:
        return "undecided"
    low, high = interval
    if margin is not None and -margin < low and high < margin:
        return "no difference that matters"
    if low > 0 or high < 0:
        return "better" if (low > 0) == higher_is_better else "worse"
    return "undecided"


def _needed(differences: Sample, error: float, margin: float | None) -> int | None:
    """Estimates the seeds needed for the interval to exclude 0 or to lie within the margin."""
    if differences.p is None or not differences.std:
        return None
    mean, deviation, count = abs(differences.mean), differences.std, differences.n
    half = max(mean, 0.0 if margin is None else margin - mean)

    def decides(n: int) -> bool:
        return bool(stats.t.ppf(1 - error / 2, n - 1) * deviation / math.sqrt(n) < half)

    return count + bisect_left(range(count, MOST), True, key=decides)
