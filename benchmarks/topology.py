"""H0 with critical edges of 781 clouds of 64 points in 64 dimensions, one thread.

python benchmarks/topology.py      (needs gudhi and ripser: pip install 'topkd[dev]')
"""

import warnings

import gudhi
import numpy as np
import torch
from ripser import ripser
from turns import in_turn

from topkd.topology import rips

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # ripser takes square clouds for distance matrices
clouds = torch.randn(781, 64, 64, generator=torch.Generator().manual_seed(0))
some = clouds[:20].double().numpy()


def simplex_tree(points: np.ndarray) -> np.ndarray:
    tree = gudhi.RipsComplex(points=points).create_simplex_tree(max_dimension=1)
    tree.compute_persistence()
    return tree.persistence_intervals_in_dimension(0)[:, 1]


ours = rips(clouds.double()).deaths[:20].numpy()
for index, points in enumerate(some):  # the same answers, before any time is printed
    peer = simplex_tree(points)
    np.testing.assert_allclose(ours[index], np.sort(peer[np.isfinite(peer)]), rtol=1e-9)


def backward() -> None:
    points = clouds.clone().requires_grad_()
    rips(points).deaths.sum().backward()


repeat = range(len(clouds) // len(some) + 1)
in_turn(
    {
        "ours": lambda: rips(clouds),
        "ours, forward and backward": backward,
        "gudhi, simplex tree": lambda: [simplex_tree(p) for _ in repeat for p in some],
        "ripser.py": lambda: [ripser(p, maxdim=0) for _ in repeat for p in some],
    },
    rounds=7,
    unit="781 clouds",
)
