"""The compiled kernel behind H1: persistent cohomology over Z/2, with sets of vertices as bits.

Edges are added one after the other, and for every H1 class that is alive one cocycle is kept: a
symmetric matrix of bits, bit w of row v being its value on the edge vw. Adding the edge uv also
adds every triangle uvw with w in its lune, the common neighbors of u and v so far:

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
from numpy.typing import NDArray

from topkd.topology._kernels import FINITE, Floats, Integers, load
from topkd.topology.compiled import compiled

ONE, ZERO = np.uint64(1), np.uint64(0)  # both sides: numba makes float64 of int64 with uint64
DIGIT = np.uint64(255)  # the bits that a pass of the sort looks at
PATIENCE = 8  # moves for each key that the last pass of the sort may take

Words = NDArray[np.uint64]


class Room(NamedTuple):
    """What a thread needs to find the classes of clouds of up to n points, beside its ``Work``."""

    # The edges up to the enclosing radius, row by row:
    length: Floats  # (edges)
    ends: Integers  # (edges), i << 32 | j
    order: Integers  # (edges), where they stand by length
    spare: Integers  # (edges)
    starts: Integers  # (256)
    # The H1 classes that are alive, in the order of birth, each at a place of its own:
    slot: Integers  # (store), that place
    birth: Integers  # (store), the edge that began it
    cocycle: Words  # (store, n, words)
    bad: Words  # (store, words), which triangles it violates
    bars: Integers  # (2 store, 2), the edges that began and ended those that are over
    key: Floats  # (2 store), how long these lived
    # The graph so far:
    adjacent: Words  # (n, words)
    lune: Words  # (words)


def room(n: int, words: int, store: int) -> Room:
    """Room for clouds of up to n points of which ``store`` classes are alive at once."""
    edges = n * (n - 1) // 2 + 1
    return Room(
        length=np.empty(edges),
        ends=np.empty(edges, np.int64),
        order=np.empty(edges, np.int64),
        spare=np.empty(edges, np.int64),
        starts=np.empty(256, np.int64),
        slot=np.arange(store),
        birth=np.empty(store, np.int64),
        cocycle=np.empty((store, n, words), np.uint64),
        bad=np.empty((store, words), np.uint64),
        bars=np.empty((2 * store, 2), np.int64),
        key=np.empty(2 * store),
        adjacent=np.empty((n, words), np.uint64),
        lune=np.empty(words, np.uint64),
    )


@compiled(fastmath=FINITE)
def _enclosing_radius(distances, n):
    """Beyond it every point is joined to one point, and nothing is alive."""
    radius = np.inf
    for i in range(n):
        farthest = 0.0
        for j in range(n):
            farthest = distances[i, j] if distances[i, j] > farthest else farthest
        radius = farthest if farthest < radius else radius
    return radius


@compiled()
def _collect_edges(distances, n, length, ends):
    """Lists the edges up to the enclosing radius, row by row; their number."""
    radius, m = _enclosing_radius(distances, n), 0
    for i in range(n):
        for j in range(i + 1, n):
            length[m], ends[m] = distances[i, j], i << 32 | j
            m += distances[i, j] <= radius  # no branch: it would be guessed wrong too often
    return m


@compiled()
def _pass(bits, low, shift, m, before, after, starts):
    """Stable order by the eight bits from ``shift`` on: one pass of a radix sort."""
    for k in range(len(starts)):
        starts[k] = 0
    for s in range(m):
        starts[np.int64((bits[before[s]] - low) >> shift & DIGIT)] += 1
    first = 0
    for k in range(len(starts)):
        starts[k], first = first, first + starts[k]
    for s in range(m):
        digit = np.int64((bits[before[s]] - low) >> shift & DIGIT)
        after[starts[digit]] = before[s]
        starts[digit] += 1


@compiled()
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


@compiled()
def _find(parent, v):
    while parent[v] != v:
        parent[v] = parent[parent[v]]
        v = parent[v]
    return v


@compiled()
def _bars_of_cloud(n, room, m, parent, merging, bits):
    """H0 deaths to ``merging``, H1 bars to ``room.bars``; their number, -1 if there is no room."""
    words = len(bits)  # known when this is compiled, so that the loops over words unroll
    length, ends, order = room.length, room.ends, room.order
    adjacent, lune = room.adjacent, room.lune
    slot, birth, cocycle, bad, bars = room.slot, room.birth, room.cocycle, room.bad, room.bars
    alive = merged = ended = 0
    for v in range(n):
        parent[v] = v
        for w in range(words):
            adjacent[v, w] = ZERO
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
            if alive == len(slot):
                return -1
            c = slot[alive]  # an H1 class is born
            for x in range(n):
                for w in range(words):
                    cocycle[c, x, w] = ZERO
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
                    return -1
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
    return ended


@compiled()
def _sort_by_persistence(bars, count, length, given, key):
    """The most persistent first, of equal ones the first that died: insertion, in place."""
    for k in range(count):
        birth, death, first = length[bars[k, 0]], length[bars[k, 1]], bars[k, 0]
        last, t = bars[k, 1], k
        persistence = death - birth if given else np.sqrt(death) - np.sqrt(birth)
        while t > 0 and key[t - 1] < persistence:
            key[t], bars[t, 0], bars[t, 1] = key[t - 1], bars[t - 1, 0], bars[t - 1, 1]
            t -= 1
        key[t], bars[t, 0], bars[t, 1] = persistence, first, last


@compiled()
def critical_edges(source, inside, given, start, stop, work, room, bits, births, deaths, count):
    """Critical edges of clouds start to stop, H0 by length and H1 by persistence.

    Args:
        source: Points (clouds, n, d), or distances (clouds, n, n) if ``given``.
        inside: Which points are no padding, (clouds, n).
        bits: Zeros, one for each word of a row of the widest cloud.
        births: (clouds, n - 1 + rows, 2), written: where classes are born; H0 first, without edges.
        deaths: The same where they die.
        count: (clouds, 2), written: H1 bars at 1, also those for which there is no row.

    Returns:
        Where it stopped, and whether for want of room: ``stop`` if all are done; else the first
        cloud that has too many classes for ``room``, or that :func:`load` refuses.
    """
    label, length, ends, first = work.label, room.length, room.ends, source.shape[1] - 1
    for cloud in range(start, stop):
        n = load(source[cloud], inside[cloud], given, True, work)
        if n == 0:
            return cloud, False
        m = _collect_edges(work.distances, n, length, ends)
        if m > 0:
            _sort(length, m, room.order, room.spare, room.starts)
        ended = _bars_of_cloud(n, room, m, work.outside, work.edges, bits)
        if ended < 0:
            return cloud, True
        for s in range(n - 1):
            deaths[cloud, s, 0] = label[work.edges[s, 0]]
            deaths[cloud, s, 1] = label[work.edges[s, 1]]
        _sort_by_persistence(room.bars, ended, length, given, room.key)
        count[cloud, 1] = ended
        for k in range(min(births.shape[1] - first, ended)):
            birth, death = ends[room.bars[k, 0]], ends[room.bars[k, 1]]
            births[cloud, first + k, 0] = label[birth >> 32]
            births[cloud, first + k, 1] = label[birth & 0xFFFFFFFF]
            deaths[cloud, first + k, 0] = label[death >> 32]
            deaths[cloud, first + k, 1] = label[death & 0xFFFFFFFF]
    return stop, False
