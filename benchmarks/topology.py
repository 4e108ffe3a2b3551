"""Persistence of batches of clouds: ours beside every peer that is installed, one thread.

python benchmarks/topology.py [EMBEDDINGS.safetensors] [--growth] [--csv FILE] [--plot FILE]

EMBEDDINGS is what a run keeps beside its result, `examples.safetensors`; without it the clouds are
Gaussian. All answers are compared before any time is printed. Peers: pip install 'topkd[dev]', and
oineus or torch_topological if you like.
"""

import argparse
import csv
import os
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec

for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"  # before anything that reads it

import gudhi  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from gudhi.sklearn import RipsPersistence  # noqa: E402
from redzed_tda import rips as redzed  # noqa: E402
from ripser import ripser  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from scipy.spatial.distance import pdist, squareform  # noqa: E402

from topkd.topology import PersistenceImage, PersistenceVector, rips  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # ripser takes square clouds for distance matrices
BATCH = 781  # clouds of 64 in the training images of CIFAR-100
Bars = list[np.ndarray]  # of each dimension


# --- Peers: one cloud (n, d) in float64 -> bars of each dimension, with distances included --------


def simplex_tree(points: np.ndarray, max_dim: int) -> Bars:
    tree = gudhi.RipsComplex(points=points).create_simplex_tree(max_dimension=max_dim + 1)
    tree.compute_persistence(homology_coeff_field=2)
    return [tree.persistence_intervals_in_dimension(d) for d in range(max_dim + 1)]


def gudhi_fast(points: np.ndarray, max_dim: int) -> Bars:
    found = RipsPersistence(list(range(max_dim + 1)), homology_coeff_field=2).fit_transform(
        [points]
    )
    return list(found[0])


def ripser_py(points: np.ndarray, max_dim: int) -> Bars:
    return ripser(squareform(pdist(points)), distance_matrix=True, maxdim=max_dim)["dgms"]


def redzed_tda(points: np.ndarray, max_dim: int) -> Bars:
    return redzed(squareform(pdist(points)), max_dim)


def oineus_py(points: np.ndarray, max_dim: int) -> Bars:
    import oineus

    found = oineus.compute_diagrams_vr(
        squareform(pdist(points)), from_pwdists=True, max_dim=max_dim + 1
    )
    return [found.in_dimension(d) for d in range(max_dim + 1)]


def torch_topological(points: np.ndarray, max_dim: int) -> Bars:
    from torch_topological.nn import VietorisRipsComplex

    found = VietorisRipsComplex(dim=max_dim)(torch.from_numpy(points))
    return [information.diagram.numpy() for information in found]


PEERS: dict[str, Callable[[np.ndarray, int], Bars]] = {
    "gudhi.sklearn": gudhi_fast,
    "redzed-tda": redzed_tda,
    "ripser.py": ripser_py,
    "gudhi, simplex tree": simplex_tree,
}
if find_spec("oineus"):
    PEERS["oineus"] = oineus_py
if find_spec("torch_topological"):
    PEERS["torch_topological"] = torch_topological


# --- Ours ----------------------------------------------------------------------------------------


def forward_and_backward(clouds: torch.Tensor, max_dim: int) -> None:
    points = clouds.clone().requires_grad_()
    found = rips(points, max_dim=max_dim)
    (found.deaths - found.births).sum().backward()


def compare(clouds: torch.Tensor, max_dim: int, names: list[str]) -> None:
    """The same bars, longer than float32 can see, of two clouds."""
    for points in clouds[:2].double():
        ours = rips(points, max_dim=max_dim, max_bars=10**5)
        for name in names:
            theirs = PEERS[name](points.numpy(), max_dim)
            for dimension, bars in enumerate(theirs):
                found = np.sort(ours.of(dimension).persistence.numpy())
                bars = np.asarray(bars).reshape(-1, 2)
                expected = np.sort((bars[:, 1] - bars[:, 0])[np.isfinite(bars[:, 1])])
                shortest = 1e-5 * squareform(pdist(points)).max()
                found, expected = found[found > shortest], expected[expected > shortest]
                np.testing.assert_allclose(found, expected, atol=shortest, err_msg=name)


def times(ways: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, list[float]]:
    """Microseconds a cloud of each way, in turn; a way is what to call and for how many clouds."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for work, _ in ways.values():
        work()
    for _ in range(rounds):
        for name, (work, clouds) in ways.items():
            start = time.perf_counter()
            work()
            found[name].append((time.perf_counter() - start) / clouds * 1e6)
    return found


def show(heading: str, found: dict[str, list[float]]) -> None:
    ours = next(iter(found.values()))
    print(f"\n{heading}\n{'':34}{'median':>11} {'least':>11}   that / ours   (us a cloud)")
    for name, each in found.items():
        ratio = statistics.median(a / b for a, b in zip(each, ours, strict=True))
        print(
            f"{name:34}{statistics.median(each):11.1f} {min(each):11.1f}   {ratio:11.2f}",
            flush=True,
        )


def batch(kind: str, clouds: torch.Tensor, rows: list[list[object]]) -> None:
    """A whole batch of ours, some clouds of the peers."""
    doubles, one = clouds.double().numpy(), clouds[:1]
    n, width = clouds.shape[1:]
    for max_dim in (0, 1):
        compare(clouds, max_dim, list(PEERS))
        diagrams = rips(clouds, max_dim=max_dim).of(max_dim)
        describe = PersistenceVector.fit(diagrams)
        image = (
            PersistenceImage.fit(diagrams) if max_dim == 0 else PersistenceImage.fit_cells(diagrams)
        )
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "ours": (lambda m=max_dim: rips(clouds, max_dim=m), len(clouds)),
            "ours, and backward": (lambda m=max_dim: forward_and_backward(clouds, m), len(clouds)),
            "ours, one cloud": (lambda m=max_dim: [rips(one, max_dim=m) for _ in range(100)], 100),
            "ours, one cloud, and backward": (
                lambda m=max_dim: [forward_and_backward(one, m) for _ in range(100)],
                100,
            ),
            "vector of ours": (lambda f=describe, d=diagrams: f(d), len(clouds)),
            "image of ours": (lambda f=image, d=diagrams: f(d), len(clouds)),
        }
        for name, peer in PEERS.items():
            few = 4 if name in ("oineus", "torch_topological") or max_dim else 20
            calls[name] = (
                lambda p=peer, f=few, m=max_dim: [p(points, m) for points in doubles[:f]],
                few,
            )
        found = times(calls, rounds=9)
        show(f"{kind}: H0{'' if max_dim == 0 else ' and H1'}, {n} points in {width}-d", found)
        rows += [
            [kind, f"H{max_dim}", n, name, statistics.median(each), min(each)]
            for name, each in found.items()
        ]


def growth(rows: list[list[object]]) -> None:
    """H0 to 4,096 points, H1 to 512; ours and the peers that are not slower by far."""
    sizes = {0: (64, 128, 256, 512, 1024, 2048, 4096), 1: (64, 128, 256, 384, 512)}
    for max_dim, each in sizes.items():
        for n in each:
            several = max(1, 1024 // n)
            clouds = torch.randn(several, n, 64, generator=torch.Generator().manual_seed(n))
            peers = ["redzed-tda", "gudhi.sklearn", "ripser.py"]
            if n * (1 + max_dim) > 1024:
                peers = peers[:2]
            compare(clouds[:1], max_dim, peers[:1])
            doubles = clouds.double().numpy()
            calls: dict[str, tuple[Callable[[], object], int]] = {
                "ours": (
                    lambda c=clouds, m=max_dim: [
                        rips(x[None], max_dim=m, max_bars=10**4) for x in c
                    ],
                    several,
                )
            }
            for name in peers:
                calls[name] = (
                    lambda p=PEERS[name], x=doubles, m=max_dim: [p(points, m) for points in x],
                    several,
                )
            found = times(calls, rounds=5)
            show(f"Gaussian: H0{'' if max_dim == 0 else ' and H1'}, {n} points in 64-d", found)
            rows += [
                ["growth", f"H{max_dim}", n, name, statistics.median(t), min(t)]
                for name, t in found.items()
            ]


def draw(rows: list[list[object]], path: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for plot, dimension in zip(axes, ("H0", "H1"), strict=True):
        chosen = [row for row in rows if row[:2] == ["growth", dimension]]
        for name in dict.fromkeys(row[3] for row in chosen):
            points = [(row[2], row[4] / 1e3) for row in chosen if row[3] == name]
            width = 2.5 if name == "ours" else 1.2
            plot.loglog(*zip(*points, strict=True), marker="o", markersize=4, lw=width, label=name)
        plot.set_title("H0" if dimension == "H0" else "H0 and H1")
        plot.set_xlabel("points in a cloud")
        plot.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds a cloud")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("embeddings", nargs="?")
parser.add_argument("--growth", action="store_true", help="also larger clouds, one at a time")
parser.add_argument("--csv", help="where to write all times")
parser.add_argument("--plot", help="where to draw the growth")
asked = parser.parse_args()

rows: list[list[object]] = []
generator = torch.Generator().manual_seed(0)
batch("Gaussian", torch.randn(BATCH, 64, 64, generator=generator), rows)
if asked.embeddings:
    embeddings = load_file(asked.embeddings)["teacher"].float()
    drawn = [torch.randperm(len(embeddings), generator=generator)[:64] for _ in range(BATCH)]
    batch("embeddings", embeddings[torch.stack(drawn)], rows)
if asked.growth:
    growth(rows)
if asked.csv:
    with open(asked.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["clouds", "dimension", "points", "what", "median us", "least us"])
        writer.writerows([*row[:4], f"{row[4]:.1f}", f"{row[5]:.1f}"] for row in rows)
if asked.plot:
    draw(rows, asked.plot)
