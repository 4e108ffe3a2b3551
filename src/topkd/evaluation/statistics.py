"""Statistics over seeds: mean, standard deviation, confidence intervals and paired tests.

A :class:`Sample` always prints its size: ``71.32 ± 0.21 (5)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95  # confidence level of intervals
FEWEST_FLIPS = 6  # pairs: with five, no sign-flip p is below 2 / 2^5 = 0.0625
MOST_FLIPS = 24  # pairs: 2^23 sums, 64 MiB


@dataclass(frozen=True)
class Sample:
    """A quantity measured with several seeds.

    Args:
        values: One finite value per seed, at least one.

    Raises:
        ValueError: If there is no value, or one is NaN or infinite.

    Examples:
        >>> str(Sample((57.1, 57.4, 56.8))), str(Sample((57.2,)))
        ('57.10 ± 0.30 (3)', '57.20 (1)')
        >>> f"{Sample((0.25, 0.35)):.3f}"
        '0.300 ± 0.071 (2)'
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a sample needs at least one value")
        if not all(map(math.isfinite, self.values)):
            raise ValueError(f"values over seeds must be finite, got {self.values}")

    @property
    def n(self) -> int:
        """Number of values."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return math.fsum(self.values) / self.n

    @property
    def std(self) -> float | None:
        r"""The sample standard deviation; None for a single value.

        .. math:: s = \sqrt{\frac{1}{n - 1} \sum_i (x_i - \bar x)^2}
        """
        if self.n < 2:
            return None
        mean = self.mean
        return math.sqrt(math.fsum((x - mean) ** 2 for x in self.values) / (self.n - 1))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean; see :meth:`confidence_interval`."""
        return self.confidence_interval(LEVEL)

    def confidence_interval(self, level: float) -> tuple[float, float] | None:
        r"""Computes a confidence interval of the mean, from Student's t distribution.

        .. math:: \bar x \pm t_{n - 1,\, (1 + \text{level}) / 2} \, \frac{s}{\sqrt n}

        Args:
            level: Confidence level, between 0 and 1.

        Returns:
            The limits; None for a single value and for equal values, whose spread is unknown.

        References:
            The Probable Error of a Mean (Student, Biometrika 1908)
            https://doi.org/10.2307/2331554

        Examples:
            >>> low, high = Sample((1.0, 2.0, 3.0)).confidence_interval(0.95)
            >>> round(low, 3), round(high, 3)
            (-0.484, 4.484)
        """
        test = self._t_test()
        if test is None:
            return None
        low, high = test.confidence_interval(level)
        return float(low), float(high)

    @property
    def p(self) -> float | None:
        r"""The p-value of the two-sided t-test against a mean of 0; None where the interval is.

        .. math:: p = 2 \, P\Big(T_{n - 1} > \frac{|\bar x|}{s / \sqrt n}\Big)
        """
        test = self._t_test()
        return None if test is None else float(test.pvalue)

    def _t_test(self) -> Any:
        """Runs scipy's t-test; returns None if the values differ at most by rounding."""
        rounding = 1e-9 * max(map(abs, self.values))
        if self.n < 2 or max(self.values) - min(self.values) <= rounding:
            return None
        from scipy import stats

        return stats.ttest_1samp(self.values, 0.0)

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        spread = "" if self.std is None else f" ± {self.std:{spec}}"
        return f"{self.mean:{spec}}{spread} ({self.n})"

    def __str__(self) -> str:
        return format(self, "")


@dataclass(frozen=True)
class Paired:
    """The difference between a method and its baseline, paired by seed."""

    difference: Sample  # method minus baseline, one value per common seed
    flip_p: float | None  # exact sign-flip test; None below six pairs

    @property
    def n(self) -> int:
        """Number of common seeds."""
        return self.difference.n

    @property
    def mean(self) -> float:
        """The mean difference."""
        return self.difference.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t-interval of the mean difference; None for one pair or equal differences."""
        return self.difference.interval

    @property
    def t_p(self) -> float | None:
        """The p-value of the paired t-test; None for one pair or equal differences."""
        return self.difference.p


def paired(method: Mapping[int, float], baseline: Mapping[int, float]) -> Paired:
    """Compares a method with its baseline, paired by seed.

    Runs with the same seed share initial weights and data order, so the effect of the seed cancels
    in the difference.

    Args:
        method: Seed -> value.
        baseline: Seed -> value. Seeds without a counterpart are ignored.

    Raises:
        ValueError: If there is no common seed.

    References:
        The Design of Experiments (Fisher, 1935), chapter 3

    Examples:
        >>> result = paired({0: 71.0, 1: 72.0, 2: 73.5}, {0: 70.0, 1: 71.5, 2: 72.0, 3: 70.0})
        >>> str(result.difference), round(result.t_p, 3), result.flip_p
        ('1.00 ± 0.50 (3)', 0.074, None)
    """
    common = sorted(method.keys() & baseline.keys())
    if not common:
        raise ValueError(
            f"method and baseline have no seed in common: {sorted(method)} and {sorted(baseline)}"
        )
    difference = Sample(tuple(method[seed] - baseline[seed] for seed in common))
    countable = FEWEST_FLIPS <= difference.n <= MOST_FLIPS
    return Paired(difference, sign_flip(difference.values) if countable else None)


def sign_flip(differences: Sequence[float]) -> float:
    r"""Computes the exact two-sided sign-flip test of differences that are symmetric around 0.

    .. math:: p = 2^{-n} \, \# \Big\{ \epsilon \in \{-1, 1\}^n :
        \Big|\sum_i \epsilon_i d_i\Big| \geq \Big|\sum_i d_i\Big| \Big\}

    Args:
        differences: One per pair, at most 24, since all sign patterns are enumerated.

    Returns:
        The two-sided p-value, at least :math:`2^{1 - n}`.

    Raises:
        ValueError: If there is no difference, or there are more than 24.

    References:
        The Design of Experiments (Fisher, 1935), section 21

    Examples:
        >>> sign_flip([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # only all + and all - are as extreme
        0.03125
    """
    if not 1 <= len(differences) <= MOST_FLIPS:
        raise ValueError(
            f"sign flips are enumerated for 1 to {MOST_FLIPS} pairs, got {len(differences)}"
        )
    # Flipping all signs leaves the absolute value unchanged, so the first sign is fixed.
    sums = np.array([differences[0]], dtype=np.float64)
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-12 * sum(map(abs, differences))
    return float(np.mean(np.abs(sums) >= abs(math.fsum(differences)) - rounding))


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Adjusts p-values for multiple comparisons by the method of Holm.

    .. math:: \tilde p_{(i)} = \max_{j \leq i} \min\big(1,\, (m - j + 1) \, p_{(j)}\big)

    for the m p-values in increasing order.

    Args:
        p_values: One per test.

    Returns:
        The adjusted p-values in the given order, to be compared with the significance level.

    References:
        A Simple Sequentially Rejective Multiple Test Procedure (Holm, Scand. J. Stat. 1979)
        https://www.jstor.org/stable/4615733

    Examples:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    corrected, greatest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = greatest
    return corrected
