"""Numbers over seeds: what they are on average, how sure that is, and whether two differ.

A number never travels without its n: a :class:`Sample` prints as ``71.32 ± 0.21 (5)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL = 0.95  # of intervals
FEWEST_FLIPS = 6  # pairs: with five, no sign-flip p is below 2 / 2^5 = 0.0625
MOST_FLIPS = 24  # pairs: 2^23 sums, 64 MiB


@dataclass(frozen=True)
class Sample:
    """One number, measured with several seeds.

    Args:
        values: A value for each seed, at least one, all finite.

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
        """How many values there are."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return math.fsum(self.values) / self.n

    @property
    def std(self) -> float | None:
        r"""The standard deviation of the population that the values come from; None of one value.

        .. math:: s = \sqrt{\frac{1}{n - 1} \sum_i (x_i - \bar x)^2}
        """
        if self.n < 2:
            return None
        mean = self.mean
        return math.sqrt(math.fsum((x - mean) ** 2 for x in self.values) / (self.n - 1))

    @property
    def interval(self) -> tuple[float, float] | None:
        r"""The 95 % interval of the mean, by Student's t distribution.

        .. math:: \bar x \pm t_{n - 1,\, 0.975} \, \frac{s}{\sqrt n}

        None of one value, and of equal values, which do not tell how far they spread.

        References:
            The Probable Error of a Mean (Student, Biometrika 1908)
            https://doi.org/10.2307/2331554

        Examples:
            >>> low, high = Sample((1.0, 2.0, 3.0)).interval
            >>> round(low, 3), round(high, 3)
            (-0.484, 4.484)
        """
        error = self._standard_error()
        if error is None:
            return None
        half = special.stdtrit(self.n - 1, (1 + LEVEL) / 2) * error
        return self.mean - float(half), self.mean + float(half)

    @property
    def p(self) -> float | None:
        r"""The p-value of the two-sided t-test against a mean of 0; None as :attr:`interval`.

        .. math:: p = 2 \, P\Big(T_{n - 1} > \frac{|\bar x|}{s / \sqrt n}\Big)
        """
        error = self._standard_error()
        if error is None:
            return None
        return float(2 * special.stdtr(self.n - 1, -abs(self.mean) / error))

    def _standard_error(self) -> float | None:
        """The standard error of the mean; None where the values differ by rounding at most."""
        std = self.std
        rounding = 1e-9 * max(map(abs, self.values))
        if std is None or max(self.values) - min(self.values) <= rounding:
            return None
        return std / math.sqrt(self.n)

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        spread = "" if self.std is None else f" ± {self.std:{spec}}"
        return f"{self.mean:{spec}}{spread} ({self.n})"

    def __str__(self) -> str:
        return format(self, "")


@dataclass(frozen=True)
class Paired:
    """How far a method is from its control with the same seeds."""

    difference: Sample  # method minus control, a value for each seed that both have
    flip_p: float | None  # exact sign-flip test; None of fewer than six pairs

    @property
    def n(self) -> int:
        """How many seeds both have."""
        return self.difference.n

    @property
    def mean(self) -> float:
        """The mean difference."""
        return self.difference.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t-interval of the mean difference; None of one pair or equal differences."""
        return self.difference.interval

    @property
    def t_p(self) -> float | None:
        """The p-value of the paired t-test; None of one pair or equal differences."""
        return self.difference.p


def paired(method: Mapping[int, float], control: Mapping[int, float]) -> Paired:
    """Compares a method with its control, seed by seed.

    Both started from the same weights and saw the same images in the same order, so that what a
    seed does to both cancels in the difference.

    Args:
        method: Seed -> value.
        control: Seed -> value; seeds that only one of them has are not used.

    Raises:
        ValueError: If they have no seed in common.

    References:
        The Design of Experiments (Fisher, 1935), chapter 3, for pairs and their sign flips

    Examples:
        >>> result = paired({0: 71.0, 1: 72.0, 2: 73.5}, {0: 70.0, 1: 71.5, 2: 72.0, 3: 70.0})
        >>> str(result.difference), round(result.t_p, 3), result.flip_p
        ('1.00 ± 0.50 (3)', 0.074, None)
    """
    common = sorted(method.keys() & control.keys())
    if not common:
        raise ValueError(
            f"method and control have no seed in common: {sorted(method)} and {sorted(control)}"
        )
    difference = Sample(tuple(method[seed] - control[seed] for seed in common))
    countable = FEWEST_FLIPS <= difference.n <= MOST_FLIPS
    return Paired(difference, sign_flip(difference.values) if countable else None)


def sign_flip(differences: Sequence[float]) -> float:
    r"""Tests whether differences are symmetric around 0, exactly and without assuming a shape.

    .. math:: p = 2^{-n} \, \# \Big\{ \epsilon \in \{-1, 1\}^n :
        \Big|\sum_i \epsilon_i d_i\Big| \geq \Big|\sum_i d_i\Big| \Big\}

    Args:
        differences: One for each pair, at most 24: all sign patterns are counted.

    Returns:
        The two-sided p-value, at least :math:`2^{1 - n}`.

    Raises:
        ValueError: If there is no difference, or there are too many to count.

    References:
        The Design of Experiments (Fisher, 1935), section 21

    Examples:
        >>> sign_flip([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # only all + and all - are as far from 0
        0.03125
    """
    if not 1 <= len(differences) <= MOST_FLIPS:
        raise ValueError(f"sign flips are counted for 1 to {MOST_FLIPS} pairs: {len(differences)}")
    # Flipping all signs changes no distance from 0, so that the first may keep its own.
    sums = np.array([differences[0]], dtype=np.float64)
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-12 * sum(map(abs, differences))
    return float(np.mean(np.abs(sums) >= abs(math.fsum(differences)) - rounding))


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Corrects the p-values of several tests, so that the chance of any false alarm stays small.

    .. math:: \tilde p_{(i)} = \max_{j \leq i} \min\big(1,\, (m - j + 1) \, p_{(j)}\big)

    for the m p-values in increasing order.

    Args:
        p_values: One for each test.

    Returns:
        As many, in the order given, to be compared with the level that one test would be.

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
