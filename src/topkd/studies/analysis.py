"""Paired comparisons of the variants of a study with its baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["better", "worse", "no difference that matters", "undecided"]
LEVEL = 0.05  # familywise error rate over the comparisons of a setting


@dataclass(frozen=True)
class Comparison:
    """Comparison of a variant with the baseline of its setting."""

    setting: str
    variant: str
    values: Mapping[int, float]
    """Seed -> metric of the variant."""
    differences: Mapping[int, float]
    """Seed -> metric of the variant minus that of the baseline."""
    low: float
    """Lower limit of the simultaneous confidence interval; NaN with fewer than two seeds."""
    high: float
    """Upper limit of the interval."""
    p: float
    """Adjusted p-value: below the level if and only if the interval excludes 0."""
    verdict: Verdict
    needed: int | None
    """Estimated number of seeds for a decision; None if the comparison is decided."""

    @property
    def mean(self) -> float:
        """Mean of the metric over seeds."""
        return float(np.mean(list(self.values.values())))

    @property
    def deviation(self) -> float:
        """Standard deviation of the metric over seeds; NaN with fewer than two."""
        values = list(self.values.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    @property
    def difference(self) -> float:
        """Mean difference to the baseline."""
        return float(np.mean(list(self.differences.values())))


def compare(
    setting: str,
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    *,
    margin: float | None = None,
    higher_is_better: bool = True,
) -> list[Comparison]:
    r"""Compares all variants of a setting with its baseline.

    Differences are paired by seed. For m variants, intervals and p-values are those of a paired
    t-test with Bonferroni correction,

    .. math:: \bar d \pm t_{n-1}(1 - \tfrac{0.05}{2m}) \frac{s}{\sqrt n}, \qquad
        p = \min(1, m\, p_t)

    so that all intervals hold simultaneously with 95 % confidence, and an interval excludes 0 if
    and only if its p-value is below 0.05.

    Args:
        setting: Name of the setting.
        values: Variant -> seed -> metric.
        baseline: Variant that the others are compared with.
        margin: Smallest difference that matters. An interval within ±margin yields the verdict
            "no difference that matters".
        higher_is_better: Whether higher values of the metric are better.

    Returns:
        One comparison for each variant that shares a seed with the baseline.

    Examples:
        >>> found, = compare("s", {"kd": {0: 1, 1: 2, 2: 3}, "new": {0: 3, 1: 4, 2: 5.1}}, "kd")
        >>> found.verdict, round(found.difference, 2)
        ('better', 2.03)
    """
    base = values[baseline]
    pairs = {
        variant: {seed: runs[seed] - base[seed] for seed in sorted(runs.keys() & base.keys())}
        for variant, runs in values.items()
        if variant != baseline
    }
    pairs = {variant: differences for variant, differences in pairs.items() if differences}
    return [
        _comparison(setting, variant, values[variant], found, len(pairs), margin, higher_is_better)
        for variant, found in pairs.items()
    ]


def _comparison(
    setting: str,
    variant: str,
    values: Mapping[int, float],
    differences: Mapping[int, float],
    family: int,
    margin: float | None,
    higher_is_better: bool,
) -> Comparison:
    d = np.array(list(differences.values()), dtype=np.float64)
    if len(d) < 2:
        return Comparison(
            setting, variant, values, differences, math.nan, math.nan, math.nan, "undecided", 2
        )
    if np.ptp(d) == 0:  # the t-test is undefined at zero variance
        low = high = float(d[0])
        p = 0.0 if d[0] else 1.0
    else:
        test = stats.ttest_1samp(d, 0.0)
        interval = test.confidence_interval(1 - LEVEL / family)
        low, high = float(interval.low), float(interval.high)
        p = min(1.0, family * float(test.pvalue))
    verdict = _verdict(low, high, margin, higher_is_better)
    needed = _needed(d, family, margin) if verdict == "undecided" else None
    return Comparison(setting, variant, values, differences, low, high, p, verdict, needed)


def _verdict(low: float, high: float, margin: float | None, higher_is_better: bool) -> Verdict:
    if margin is not None and -margin < low and high < margin:
        return "no difference that matters"
    if low > 0 or high < 0:
        return "better" if (low > 0) == higher_is_better else "worse"
    return "undecided"


def _needed(d: np.ndarray, family: int, margin: float | None) -> int:
    """Estimates the seeds needed for the interval to exclude 0 or to lie within the margin."""
    mean, deviation = abs(float(d.mean())), float(d.std(ddof=1))
    half = max(mean, 0.0 if margin is None else margin - mean, 1e-12)
    count = len(d)
    while count < 1_000_000:
        reached = stats.t.ppf(1 - LEVEL / (2 * family), count - 1) * deviation / math.sqrt(count)
        if reached < half:
            return count
        count = max(count + 1, math.ceil(count * min(4.0, (reached / half) ** 2)))
    return count
