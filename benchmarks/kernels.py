"""Where the time of exact persistence goes, and how fast it could be, on one thread.

python benchmarks/kernels.py [--csv FILE]

The stages of 64 points in 64-d, one upon the other, are timed in turn, the least of many rounds,
beside a bound: the multiply-adds of the distances at the rate at which this core multiplies large
matrices, which does them as fast as they can be done.
"""

import argparse
import csv
import os
import time
from collections.abc import Callable

for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"  # before anything that reads it

import torch  # noqa: E402
from numba import njit  # noqa: E402

from topkd.topology import _cocycles, _kernels, rips  # noqa: E402
from topkd.topology.critical import critical_edges  # noqa: E402
from topkd.topology.lengths import edge_lengths  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--csv", help="where to write them")
asked = parser.parse_args()
torch.set_num_threads(1)
CLOUDS, N, D, ROUNDS = 781, 64, 64, 60


@njit(nogil=True)
def load(source, inside, work):
    for cloud in range(len(source)):
        _kernels._load_points(source[cloud], inside[cloud], work)


@njit(nogil=True)
def load_and_measure(source, inside, work):
    for cloud in range(len(source)):
        _kernels._load_points(source[cloud], inside[cloud], work)
        _kernels._squares(N, work)


@njit(nogil=True)
def load_measure_and_span(source, inside, work):
    for cloud in range(len(source)):
        _kernels._load_points(source[cloud], inside[cloud], work)
        _kernels._squares(N, work)
        _kernels._prim(N, True, work)


@njit(nogil=True)
def load_and_collect(source, inside, n, work, room):
    for cloud in range(len(source)):
        _kernels.load(source[cloud], inside[cloud], False, True, work)
        _cocycles._collect_edges(work.distances, n, room.length, room.ends)


@njit(nogil=True)
def load_collect_and_sort(source, inside, n, work, room):
    for cloud in range(len(source)):
        _kernels.load(source[cloud], inside[cloud], False, True, work)
        m = _cocycles._collect_edges(work.distances, n, room.length, room.ends)
        _cocycles._sort(room.length, m, room.order, room.spare, room.starts)


def least(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least microseconds of each, all in turn: a processor that slows down does so for all."""
    seconds = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(found[1:]) * 1e6 for name, found in seconds.items()}  # the first compiles


generator = torch.Generator().manual_seed(0)
points = torch.randn(CLOUDS, N, D, generator=generator)
inside = torch.ones(CLOUDS, N, dtype=torch.bool)
source, there = points.numpy(), inside.numpy()
room = _kernels.work(N, D, matrix=True)
edges = torch.zeros(CLOUDS, N - 1, 2, dtype=torch.int64)
gradient = points.clone().requires_grad_()
loops = _cocycles.room(N, 1, N)

matrix = torch.randn(1024, 1024, dtype=torch.float64, generator=generator)
one = points[:1]
FULL_RATE = "bound: the distances at full rate"
found = least(
    {
        "read and convert the points": lambda: load(source, there, room),
        "+ squared distances": lambda: load_and_measure(source, there, room),
        "+ spanning tree": lambda: load_measure_and_span(source, there, room),
        "+ edges in order (the kernel)": lambda: _kernels.merging_edges(
            source, there, False, True, 0, CLOUDS, room, edges.numpy()
        ),
        "+ the operator of torch": lambda: critical_edges(points, inside, False, 0, 0, True),
        "rips: + lengths, masks, counts": lambda: rips(points),
        "with the backward pass": lambda: rips(gradient).deaths.sum().backward(),
        "one cloud at a time": lambda: [rips(one) for _ in range(CLOUDS)],
        "H0 and H1: read, distances, edges that count": lambda: load_and_collect(
            source, there, N, room, loops
        ),
        "+ their order": lambda: load_collect_and_sort(source, there, N, room, loops),
        "rips: + cocycles, bars, lengths, masks": lambda: rips(points, max_dim=1),
        "lengths alone": lambda: edge_lengths(points, edges),
        FULL_RATE: lambda: matrix @ matrix,
    }
)
rows = {name: us / CLOUDS for name, us in found.items()}
rows[FULL_RATE] = found[FULL_RATE] * N * (N - 1) / 2 * D / 1024**3
print(f"{N} points in {D}-d, {CLOUDS} clouds, us a cloud, the least of {ROUNDS} rounds")
for name, us in rows.items():
    print(f"{name:46}{us:8.1f}")
if asked.csv:
    with open(asked.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", "least us"])
        writer.writerows((name, f"{us:.2f}") for name, us in rows.items())
