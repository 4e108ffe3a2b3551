"""Against scipy, plain loops and published numbers; laws by hypothesis."""

import itertools
import math
import statistics as stdlib

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from topkd.evaluation.statistics import Sample, holm, paired, sign_flip

numbers = st.integers(-10_000, 10_000).map(lambda n: n / 100)  # as accuracies differ: by hundredths
values = st.lists(numbers, min_size=2, max_size=8)

# Darwin's maize: cross- minus self-fertilised heights in eighths of an inch, the data of Fisher's
# Design of Experiments, chapter 3; he finds t = 2.148 (section 17), and in section 21 that 863 of
# the 32,768 sign patterns give a sum of 314 or more, 1,726 both ways.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_text_never_lacks_n():
    assert str(Sample((71.1, 71.3, 71.5))) == "71.30 ± 0.20 (3)"
    assert str(Sample((57.2,))) == "57.20 (1)"
    assert f"{Sample((0.2,)):.3f}" == "0.200 (1)"


@given(values)
def test_mean_and_deviation_agree_with_the_standard_library(x):
    sample = Sample(tuple(x))
    assert sample.n == len(x)
    assert sample.mean == pytest.approx(stdlib.mean(x))
    assert sample.std == pytest.approx(stdlib.stdev(x))


@given(values)
def test_interval_and_p_agree_with_scipy(x):
    assume(len(set(x)) > 1)
    sample, theirs = Sample(tuple(x)), stats.ttest_1samp(x, 0)
    low, high = theirs.confidence_interval(0.95)
    assert sample.interval == pytest.approx((low, high))
    assert sample.p == pytest.approx(theirs.pvalue, abs=1e-12)


def test_interval_from_a_printed_table():
    # t for 4 degrees of freedom and 95 % is 2.776; the standard error of 1..5 is sqrt(2.5 / 5).
    half = 2.776 * math.sqrt(0.5)
    assert Sample((1.0, 2.0, 3.0, 4.0, 5.0)).interval == pytest.approx((3 - half, 3 + half), 1e-3)


@pytest.mark.parametrize("same", [(1.5,), (1.5, 1.5, 1.5), (0.0, 0.0), (0.1 + 0.2, 0.3)])
def test_values_without_spread_make_no_interval(same):
    assert Sample(same).interval is None
    assert Sample(same).p is None


@pytest.mark.parametrize("wrong", [(), (1.0, math.nan), (math.inf,)])
def test_a_sample_of_nothing_or_of_what_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match="value"):
        Sample(wrong)


def test_darwins_maize():
    result = paired(dict(enumerate(MAIZE)), dict.fromkeys(range(15), 0))
    standard_error = result.difference.std / math.sqrt(15)
    assert result.mean / standard_error == pytest.approx(2.148, abs=5e-4)
    assert result.t_p == pytest.approx(0.0497, abs=5e-5)
    assert result.flip_p == 1726 / 2**15


@given(st.lists(numbers, min_size=1, max_size=8))
def test_sign_flips_agree_with_counting_all(x):
    hundredths = [round(100 * d) for d in x]  # integers, so that equal sums are equal
    patterns = list(itertools.product((-1, 1), repeat=len(x)))
    far = sum(
        abs(sum(s * d for s, d in zip(signs, hundredths, strict=True))) >= abs(sum(hundredths))
        for signs in patterns
    )
    assert sign_flip(x) == far / len(patterns)


def test_sign_flips_agree_with_scipy():
    x = np.random.default_rng(0).normal(0.4, 1, 9)
    theirs = stats.permutation_test(
        (x,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(x.tolist()) == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("count", [0, 25])
def test_sign_flips_are_not_counted_for_ever(count):
    with pytest.raises(ValueError, match="1 to 24"):
        sign_flip([1.0] * count)


def test_pairs_are_made_by_seed():
    result = paired({4: 7.0, 0: 1.0, 2: 5.0, 9: 100.0}, {2: 1.0, 0: 2.0, 4: 3.0, 5: -100.0})
    assert result.difference.values == (-1.0, 4.0, 4.0)
    theirs = stats.ttest_rel([1.0, 5.0, 7.0], [2.0, 1.0, 3.0])
    assert (result.n, result.t_p) == (3, pytest.approx(theirs.pvalue))
    assert result.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_one_pair_says_nothing_but_its_difference():
    result = paired({0: 71.0}, {0: 70.0, 1: 69.0})
    assert (result.n, result.mean) == (1, 1.0)
    assert (result.interval, result.t_p, result.flip_p) == (None, None, None)


@pytest.mark.parametrize(("pairs", "known"), [(5, False), (6, True), (24, True), (25, False)])
def test_sign_flips_are_used_where_they_can_tell_something(pairs, known):
    method = {seed: 70 + seed % 7 for seed in range(pairs)}
    assert (paired(method, dict.fromkeys(method, 70.0)).flip_p is not None) is known


def test_no_seed_in_common_is_an_error():
    with pytest.raises(ValueError, match=r"no seed in common: \[0\] and \[1\]"):
        paired({0: 1.0}, {1: 1.0})


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04 raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=6), st.floats(0.001, 0.2))
def test_holm_rejects_what_stepping_down_rejects(p_values, level):
    rejected, left = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
    while left and (len(left)) * p_values[left[0]] <= level:
        rejected.add(left.pop(0))
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected
