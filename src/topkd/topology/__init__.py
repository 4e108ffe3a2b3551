"""Persistent homology for training loops: differentiable functions of PyTorch tensors.

============================  ==========================================  ================  =======
name                          computes                                    cost per cloud    grad
============================  ==========================================  ================  =======
:func:`rips`                  exact Vietoris-Rips diagrams: H0            O(n² d)           yes
..                            H1, H2                                      see its docs      yes
:class:`PersistenceVector`    histogram of persistence, 20 bins           O(20 n)           yes
:class:`PersistenceImage`     persistence image, 20 x 20 pixels           O(400 n)          yes
:class:`BettiCurve`           number of bars at each length               O(100 n)          yes [1]_
:class:`Landscape`            largest tent functions                      O(100 n log n)    yes
:class:`Silhouette`           weighted mean of the tent functions         O(100 n)          yes
:class:`EntropyCurve`         entropy of the bars at each length          O(100 n)          yes [1]_
:func:`entropy`               persistence entropy                         O(n)              yes
:func:`wasserstein`           Wasserstein distance of diagrams: H0        O(n log n)        yes
..                            with matching to the diagonal               O(n³)             yes
:func:`bottleneck`            bottleneck distance of diagrams             O(n^2.5 log n)    yes
:func:`sliced_wasserstein`    sliced Wasserstein distance                 O(50 n log n)     yes
:func:`edge_matching`         lengths of both trees' edges (TopoAE)       O(n² d)           yes
:func:`rtd_lite`              lengths at which clusters form (RTD-Lite)   O(n² d)           yes
:func:`ultrametric`           single-linkage heights of all pairs         O(n² d)           yes
:func:`persistence_weighted`  critical edges, weighted by persistence     O(n² d)           yes
:class:`RipsNet`              approximate vectorization (TopKD)           O(n d²)           yes
:class:`DistanceNet`          approximate vectorization, from distances   O(n² d)           yes
============================  ==========================================  ================  =======

"grad" states whether gradients reach the points. The comparisons from :func:`edge_matching` to
:func:`persistence_weighted` need corresponding points, see :mod:`topkd.topology.matched`. Length
scales are documented in :mod:`topkd.topology.scaling`. This package does not import other packages
of topkd.

.. [1] If smoothed.
"""

import importlib
import pkgutil

from topkd.topology.approximation import Approximation, Exact, Fidelity, Training, fidelity, train
from topkd.topology.curves import BettiCurve, EntropyCurve, Landscape, Silhouette, entropy
from topkd.topology.distancenet import DistanceNet
from topkd.topology.distances import bottleneck, sliced_wasserstein, wasserstein
from topkd.topology.images import (
    PersistenceImage,
    PersistenceVector,
)
from topkd.topology.lengths import edge_lengths
from topkd.topology.matched import (
    edge_matching,
    persistence_weighted,
    rtd_lite,
    single_linkage,
    ultrametric,
)
from topkd.topology.rips import Diagrams, rips
from topkd.topology.ripsnet import RipsNet
from topkd.topology.scaling import length_scale
from topkd.topology.serialization import VectorizationLayer, lost_mass
from topkd.topology.vectorization import VECTORIZATIONS, Vectorization

for _module in pkgutil.iter_modules(__path__):  # registers the vectorizations of every module
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "VECTORIZATIONS",
    "Approximation",
    "BettiCurve",
    "Diagrams",
    "DistanceNet",
    "EntropyCurve",
    "Exact",
    "Fidelity",
    "Landscape",
    "PersistenceImage",
    "PersistenceVector",
    "RipsNet",
    "Silhouette",
    "Training",
    "Vectorization",
    "VectorizationLayer",
    "bottleneck",
    "edge_lengths",
    "edge_matching",
    "entropy",
    "fidelity",
    "length_scale",
    "lost_mass",
    "persistence_weighted",
    "rips",
    "rtd_lite",
    "single_linkage",
    "sliced_wasserstein",
    "train",
    "ultrametric",
    "wasserstein",
]
