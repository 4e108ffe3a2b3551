"""The compiled kernel behind H1: persistent cohomology over Z/2, with sets of vertices as bits.

Edges are added one after the other, and for every H1 class that is alive one cocycle is kept: a
symmetric matrix of bits, bit w of row v being its value on the edge vw. Adding the edge uv also
adds every triangle uvw with w in its lune, the common neighbours of u and v so far:

* an empty lune adds no triangle: two components merge, or an H1 class is born;
* otherwise every cocycle is extended to uv by what the first triangle demands of it; one XOR and
  one AND of rows tell which other triangles it then violates;
* the youngest cocycle that violates a triangle dies there, and is added to the older ones that
  violate the same: Gaussian elimination over Z/2, with the youngest as pivot.

References:
    Computing persistent cohomology by annotations (Boissonnat et al., 2013)
    https://arxiv.org/abs/1304.6813
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from topkd.topology._kernels import FINITE, Floats, Integers, load

ONE, ZERO = np.uint64(1), np.uint64(0)  # both sides: numba makes float64 of int64 with uint64
STORE = 32  # cocycles for which there is room at first; Gaussian clouds of 64 points keep 26
DIGIT = np.uint64(255)  # the bits that a pass of the sort looks at
PATIENCE = 8  # moves for each key that the last pass of the sort may take

Words = NDArray[np.uint64]


class Sorting(NamedTuple):
    """What a thread needs to order the edges of clouds of up to n points."""

    length: Floats  # of the edges up to the enclosing radius, row by row
    ends: Integers  # i << 32 | j of each
    order: Integers
    spare: Integers
    starts: Integers  # (256)


def sorting(n: int) -> Sorting:
    """Room for clouds of up to n points."""
    edges = n * (n - 1) // 2 + 1
    ends, order, spare = (np.empty(edges, np.int64) for _ in range(3))
    return Sorting(np.empty(edges), ends, order, spare, np.empty(256, np.int64))


@njit(nogil=True, cache=True, fastmath=FINITE)
def _enclosing_radius(distances, n):
    """Beyond it every point is joined to one point, and nothing is alive."""
    radius = np.inf
    for i in range(n):
        farthest = 0.0
        for j in range(n):
            farthest = distances[i, j] if distances[i, j] > farthest else farthest
        radius = farthest if farthest < radius else radius
    return radius


@njit(nogil=True, cache=True)
def _collect_edges(distances, n, length, ends):
    """Lists the edges up to the enclosing radius, row by row; their number."""
    radius, m = _enclosing_radius(distances, n), 0
    for i in range(n):
        for j in range(i + 1, n):
            length[m], ends[m] = distances[i, j], i << 32 | j
            m += distances[i, j] <= radius  # no branch: it would be guessed wrong too often
    return m


@njit(nogil=True, cache=True)
def _pass(bits, low, shift, m, before, after, starts):
    """Stable order by the eight bits from ``shift`` on: one pass of a radix sort."""
    starts[:] = 0
    for s in range(m):
        starts[np.int64((bits[before[s]] - low) >> shift & DIGIT)] += 1
    first = 0
    for k in range(len(starts)):
        starts[k], first = first, first + starts[k]
    for s in range(m):
        k = np.int64((bits[before[s]] - low) >> shift & DIGIT)
        after[starts[k]] = before[s]
        starts[k] += 1


@njit(nogil=True, cache=True)
def _sort(length, m, order, spare, starts):
    """Stable order of m non-negative numbers, whose bits are ordered as they are.

    Two passes over the leading 16 bits in which they differ, then insertion; where that takes too
    many moves, because nearly all share these bits, eight passes over all 64.
    """
    bits = length.view(np.uint64)
    low, high, shift = bits[0], bits[0], ZERO
    for e in range(m):
        order[e] = e
        low, high = min(low, bits[e]), max(high, bits[e])
    while (high - low) >> shift >= ONE << np.uint64(16):
        shift += ONE
    _pass(bits, low, shift, m, order, spare, starts)
    _pass(bits, low, shift + np.uint64(8), m, spare, order, starts)
    moves = 0
    for s in range(1, m):
        e, t = order[s], s
        while t > 0 and length[order[t - 1]] > length[e]:
            order[t] = order[t - 1]
            t -= 1
        order[t] = e
        moves += s - t
        if moves > PATIENCE * m:
            break
    if moves > PATIENCE * m:
        for e in range(m):
            order[e] = e
        for digits in range(0, 8, 2):
            _pass(bits, low, np.uint64(8 * digits), m, order, spare, starts)
            _pass(bits, low, np.uint64(8 * digits + 8), m, spare, order, starts)


@njit(nogil=True, cache=True)
def _find(parent, v):
    while parent[v] != v:
        parent[v] = parent[parent[v]]
        v = parent[v]
    return v


@njit(nogil=True, cache=True)
def _bars_of_cloud(n, sorting, m, parent, merging, bits):
    """H0 deaths to ``merging``; returns the edges that begin and end each H1 class."""
    words = len(bits)  # known when this is compiled, so that the loops over words unroll
    length, ends, order = sorting.length, sorting.ends, sorting.order
    adjacent, lune = np.zeros((n, words), np.uint64), np.empty(words, np.uint64)
    cocycle, bad = np.zeros((STORE, n, words), np.uint64), np.zeros((STORE, words), np.uint64)
    birth, slot = np.zeros(STORE, np.int64), np.arange(STORE)
    bars = np.empty((2 * STORE, 2), np.int64)
    alive = merged = ended = 0
    for v in range(n):
        parent[v] = v
    for s in range(m):
        e = order[s]
        u, v = ends[e] >> 32, ends[e] & 0xFFFFFFFF
        u_word, u_bit = u >> 6, ONE << np.uint64(u & 63)
        v_word, v_bit = v >> 6, ONE << np.uint64(v & 63)
        first = -1
        for w in range(words - 1, -1, -1):
            lune[w] = adjacent[u, w] & adjacent[v, w]
            if lune[w] != ZERO:
                first = w
        adjacent[u, v_word] |= v_bit
        adjacent[v, u_word] |= u_bit
        if first < 0:
            a, b = _find(parent, u), _find(parent, v)
            if a != b:  # an H0 class dies
                parent[a] = b
                merging[merged, 0], merging[merged, 1] = u, v
                merged += 1
                continue
            if alive == len(slot):  # an H1 class is born
                more_slot, more_birth = np.arange(2 * alive), np.zeros(2 * alive, np.int64)
                more_cocycle = np.zeros((2 * alive, n, words), np.uint64)
                more_slot[:alive], more_birth[:alive], more_cocycle[:alive] = slot, birth, cocycle
                slot, birth, cocycle = more_slot, more_birth, more_cocycle
                bad = np.zeros((2 * alive, words), np.uint64)
            c = slot[alive]
            cocycle[c] = ZERO
            cocycle[c, u, v_word], cocycle[c, v, u_word] = v_bit, u_bit
            birth[c] = e
            alive += 1
            continue
        pivot, dirty = lune[first] & (~lune[first] + ONE), ZERO
        for k in range(alive):  # extend every cocycle by what the first triangle demands
            c = slot[k]
            holds = (cocycle[c, u, first] ^ cocycle[c, v, first]) & pivot != ZERO
            for w in range(words):
                demanded = (cocycle[c, u, w] ^ cocycle[c, v, w]) & lune[w]
                bad[c, w] = demanded ^ lune[w] if holds else demanded
                dirty |= bad[c, w]
            if holds:
                cocycle[c, u, v_word] |= v_bit
                cocycle[c, v, u_word] |= u_bit
        if dirty == ZERO:
            continue
        for k in range(alive - 1, -1, -1):  # the youngest first
            y, first = slot[k], -1
            for w in range(words - 1, -1, -1):
                if bad[y, w] != ZERO:
                    first = w
            if first < 0:
                continue
            if length[birth[y]] < length[e]:  # an H1 class dies; none of length zero is told
                if ended == len(bars):
                    more_bars = np.empty((2 * ended, 2), np.int64)
                    more_bars[:ended] = bars
                    bars = more_bars
                bars[ended, 0], bars[ended, 1] = birth[y], e
                ended += 1
            pivot = bad[y, first] & (~bad[y, first] + ONE)
            for older in range(k):
                c = slot[older]
                if bad[c, first] & pivot != ZERO:
                    for w in range(words):
                        bad[c, w] ^= bad[y, w]
                    for x in range(n):
                        for w in range(words):
                            cocycle[c, x, w] ^= cocycle[y, x, w]
            birth[y] = -1
        kept = 0
        for k in range(alive):  # close the gaps, in the order of birth
            c = slot[k]
            if birth[c] >= 0:
                slot[k], slot[kept] = slot[kept], c
                kept += 1
        alive = kept
    return bars[:ended]


@njit(nogil=True, cache=True)
def _sort_by_persistence(bars, length, given):
    """The most persistent first, of equal ones the first that died: insertion, in place."""
    key = np.empty(len(bars))
    for k in range(len(bars)):
        birth, death, first = length[bars[k, 0]], length[bars[k, 1]], bars[k, 0]
        last, t = bars[k, 1], k
        persistence = death - birth if given else np.sqrt(death) - np.sqrt(birth)
        while t > 0 and key[t - 1] < persistence:
            key[t], bars[t, 0], bars[t, 1] = key[t - 1], bars[t - 1, 0], bars[t - 1, 1]
            t -= 1
        key[t], bars[t, 0], bars[t, 1] = persistence, first, last


@njit(nogil=True, cache=True)
def critical_edges(source, inside, given, start, stop, work, sorting, bits, births, deaths, count):
    """Critical edges of clouds start to stop, H0 by length and H1 by persistence.

    Args:
        source: Points (clouds, n, d), or distances (clouds, n, n) if ``given``.
        inside: Which points are no padding, (clouds, n).
        bits: Zeros, one for each word of a row of the widest cloud.
        births: (clouds, n - 1 + rows, 2), written: where classes are born; H0 first, without edges.
        deaths: The same where they die.
        count: (clouds, 2), written: H1 bars at 1, also those for which there is no row.

    Returns:
        The first cloud that :func:`load` refuses; -1 if there is none.
    """
    label, length, ends, first = work.label, sorting.length, sorting.ends, source.shape[1] - 1
    for cloud in range(start, stop):
        n = load(source[cloud], inside[cloud], given, True, work)
        if n == 0:
            return cloud
        m = _collect_edges(work.distances, n, length, ends)
        if m > 0:
            _sort(length, m, sorting.order, sorting.spare, sorting.starts)
        bars = _bars_of_cloud(n, sorting, m, work.outside, work.edges, bits)
        for s in range(n - 1):
            deaths[cloud, s, 0] = label[work.edges[s, 0]]
            deaths[cloud, s, 1] = label[work.edges[s, 1]]
        _sort_by_persistence(bars, length, given)
        count[cloud, 1] = len(bars)
        for k in range(min(births.shape[1] - first, len(bars))):
            birth, death = ends[bars[k, 0]], ends[bars[k, 1]]
            births[cloud, first + k, 0] = label[birth >> 32]
            births[cloud, first + k, 1] = label[birth & 0xFFFFFFFF]
            deaths[cloud, first + k, 0] = label[death >> 32]
            deaths[cloud, first + k, 1] = label[death & 0xFFFFFFFF]
    return -1
