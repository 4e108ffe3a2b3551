"""The compiled kernel behind H1: persistent cohomology over Z/2 with bit sets of vertices.

Edges are added one by one. Each living H1 class has a cocycle, stored as a symmetric bit matrix:
bit w of row v is its value on the edge vw. Adding the edge uv also adds the triangles uvw for all w
in its lune, the common neighbors of u and v so far:

* If the lune is empty, no triangle is added: two components merge, or an H1 class is born.
* Otherwise, the first triangle determines the value of each cocycle on uv. One XOR and one AND of
  rows give the other triangles on which the cocycle condition fails.
* The youngest cocycle that fails on a triangle dies, and is added to the older ones that fail on
  the same triangle: Gaussian elimination over Z/2 with the youngest as pivot.

References:
    Computing persistent cohomology by annotations (Boissonnat et al., 2013)
    https://arxiv.org/abs/1304.6813
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from topkd.topology._kernels import FINITE, Floats, Integers, load
from topkd.topology.compiled import compiled

ONE, ZERO = np.uint64(1), np.uint64(0)  # Numba promotes int64 with uint64 to float64
DIGIT = np.uint64(255)  # bits per pass of the radix sort
PATIENCE = 8  # maximum moves per key in the insertion sort

Words = NDArray[np.uint64]


class Room(NamedTuple):
    """Workspace of a thread for H1 of clouds of up to n points, in addition to ``Work``."""

    # Edges up to the enclosing radius, in row-major order:
    length: Floats  # (edges)
    ends: Integers  # (edges), i << 32 | j
    order: Integers  # (edges), sorted order by length
    spare: Integers  # (edges)
    starts: Integers  # (256)
    # Living H1 classes, in order of birth:
    slot: Integers  # (store), storage position
    birth: Integers  # (store), birth edge
    cocycle: Words  # (store, n, words)
    bad: Words  # (store, words), triangles on which the condition fails
    bars: Integers  # (2 store, 2), birth and death edges of dead classes
    key: Floats  # (2 store), persistence of these
    # Graph of the edges so far:
    adjacent: Words  # (n, words)
    lune: Words  # (words)


def room(n: int, words: int, store: int) -> Room:
    """Allocates a workspace for n points and ``store`` simultaneously living classes."""
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
    """Enclosing radius: beyond it the complex is a cone and has no living classes."""
    radius = np.inf
    for i in range(n):
        farthest = 0.0
        for j in range(n):
            farthest = distances[i, j] if distances[i, j] > farthest else farthest
        radius = farthest if farthest < radius else radius
    return radius


@compiled()
def _collect_edges(distances, n, length, ends):
    """Lists the edges up to the enclosing radius in row-major order; returns their number."""
    radius, m = _enclosing_radius(distances, n), 0
    for i in range(n):
        for j in range(i + 1, n):
            length[m], ends[m] = distances[i, j], i << 32 | j
            m += distances[i, j] <= radius  # branch-free: a branch would be mispredicted too often
    return m


@compiled()
def _pass(bits, low, shift, m, before, after, starts):
    """One pass of a stable radix sort, by the eight bits from ``shift``."""
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
    """Stable sort of m non-negative floats, whose bit patterns have the same order.

    Two radix passes over the leading 16 bits that differ, then insertion sort. If that needs too
    many moves, because most keys share these bits, eight passes over all 64 bits.
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
    """Writes H0 deaths and H1 bars; returns the number of H1 bars, or -1 if storage is full."""
    words = len(bits)  # a compile-time constant, so loops over words are unrolled
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
        for k in range(alive):  # the first triangle determines the value on uv
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
            if length[birth[y]] < length[e]:  # an H1 class dies; bars of length zero are omitted
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
        for k in range(alive):  # compact, in order of birth
            c = slot[k]
            if birth[c] >= 0:
                slot[k], slot[kept] = slot[kept], c
                kept += 1
        alive = kept
    return ended


@compiled()
def _sort_by_persistence(bars, count, length, given, key):
    """Insertion sort by decreasing persistence, in place; ties by death."""
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
    """Finds critical edges of clouds start to stop, H0 by length and H1 by persistence.

    Args:
        source: Points (clouds, n, d), or distances (clouds, n, n) if ``given``.
        inside: False for padding, (clouds, n).
        bits: Tuple of zeros, one per word of a row; its length is a compile-time constant.
        births: Output, (clouds, n - 1 + rows, 2): birth edges; H0 is first and has none.
        deaths: Output, (clouds, n - 1 + rows, 2): death edges.
        count: Output, (clouds, 2): number of H1 bars in column 1, including those beyond the rows.

    Returns:
        The cloud at which it stopped, and whether storage was full. The cloud is ``stop`` if all
        are done; otherwise it has too many classes for ``room``, or :func:`load` rejects it.
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
