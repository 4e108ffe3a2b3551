"""Exact persistence beside three other libraries, on 2,000 clouds: features, and what breaks."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from topkd.topology import rips

CLOUDS = 2000


def gaussian(rng, n, d):
    return squareform(pdist(rng.standard_normal((n, d))))


def features(rng, n, d):
    return squareform(pdist(np.maximum(rng.standard_normal((n, d)), 0)))


def clusters(rng, n, d):
    centers = 10 * rng.standard_normal((5, d))
    return squareform(pdist(centers[rng.integers(5, size=n)] + rng.standard_normal((n, d))))


def grid_with_ties_and_duplicates(rng, n, d):
    return squareform(pdist(rng.integers(0, 4, (n, min(d, 3))).astype(float)))


def collinear(rng, n, d):
    return squareform(pdist(np.outer(rng.standard_normal(n), np.ones(d))))


def polygon(rng, n, d):
    angles = 2 * np.pi * np.arange(n) / n
    return squareform(pdist(np.stack([np.cos(angles), np.sin(angles)], 1)))


def no_metric(rng, n, d):
    return squareform(rng.random(n * (n - 1) // 2))


def no_metric_with_ties(rng, n, d):
    return squareform(rng.integers(1, 5, n * (n - 1) // 2).astype(float))


def bipartite(rng, n, d):
    side = rng.integers(2, size=n)
    lengths = np.where(side[:, None] == side, 2.0, 1.0)
    np.fill_diagonal(lengths, 0)
    return lengths


KINDS = [
    gaussian,
    features,
    clusters,
    grid_with_ties_and_duplicates,
    collinear,
    polygon,
    no_metric,
    no_metric_with_ties,
    bipartite,
]


def matrices(kind):
    """Most are small, for the peers' sake; some just fill a word of the kernel, some more."""
    rng = np.random.default_rng(KINDS.index(kind))
    for number in range(math.ceil(CLOUDS / len(KINDS))):
        n = int(rng.integers(2, 25))
        if number % 24 == 0:
            n = int(rng.choice([1, 63, 64, 65, 100]))
        if kind is bipartite:
            n = min(n, 30)  # it has (n / 2 - 1)² loops
        d = int(rng.choice([1, 2, 3, 8, 64, 512]))
        yield kind(rng, n, d) if n > 1 else np.zeros((1, 1))
    if kind in (gaussian, clusters, grid_with_ties_and_duplicates):
        for n in (128, 129, 200, 256):
            yield kind(rng, n, 3)


def ours(distances):
    """Bars of H0 and H1 without those of length zero, sorted."""
    n = len(distances)
    found = rips(distances=torch.from_numpy(distances), max_dim=1, max_bars=max(1, n * n // 4))
    kept = [found.of(dimension) for dimension in (0, 1)]
    return [ordered(d.bars[d.mask & (d.persistence > 0)].numpy()) for d in kept]


def ordered(bars):
    bars = np.asarray(bars, float).reshape(-1, 2)
    bars = bars[np.isfinite(bars[:, 1]) & (bars[:, 0] < bars[:, 1])]
    return bars[np.lexsort(bars.T)]


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_gudhi_to_the_last_bit(kind):
    gudhi = pytest.importorskip("gudhi.sklearn")
    persistence = gudhi.RipsPersistence(
        [0, 1], homology_coeff_field=2, input_type="full distance matrix"
    )
    for distances in matrices(kind):
        (expected,) = persistence.fit_transform([distances])
        for found, bars in zip(ours(distances), expected, strict=True):
            np.testing.assert_array_equal(found, ordered(bars))


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_ripser(kind):
    ripser = pytest.importorskip("ripser")
    for distances in matrices(kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = ripser.ripser(distances, distance_matrix=True, maxdim=1)["dgms"]
        assert_close_in_float32(distances, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_redzed(kind):
    redzed = pytest.importorskip("redzed_tda")
    for distances in matrices(kind):
        assert_close_in_float32(distances, redzed.rips(distances, 1))


def assert_close_in_float32(distances, expected):
    """Where float32 cannot tell lengths apart, a bar may be shorter than it can see."""
    shortest = 1e-6 * distances.max(initial=0)
    for found, bars in zip(ours(distances), expected, strict=True):
        seen = [ordered(side)[lengths(ordered(side)) > shortest] for side in (found, bars)]
        # Rounding may swap bars that are nearly equal: both sides are compared column by column.
        for column in (0, 1):
            one, other = (np.sort(side[:, column]) for side in seen)
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=shortest)


def lengths(bars):
    return bars[:, 1] - bars[:, 0]
