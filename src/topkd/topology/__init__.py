"""Persistent homology for training loops: torch in, torch out, with gradients.

============================  ==========================================  ================  =======
what                          computes                                    cost of a cloud   differs
============================  ==========================================  ================  =======
:func:`rips`                  exact diagrams of Vietoris-Rips: H0         O(n² d)           yes
..                            and H1, H2                                  see its docs      yes
:class:`PersistenceVector`    a diagram as 20 numbers, without scale      O(20 n)           yes
:class:`PersistenceImage`     a diagram as 20 x 20 pixels                 O(400 n)          yes
:class:`BettiCurve`           how many bars are open at a length          O(100 n)          yes [1]_
:class:`Landscape`            the highest tents over bars                 O(100 n log n)    yes
:class:`Silhouette`           their weighted mean                         O(100 n)          yes
:class:`EntropyCurve`         entropy of the bars open at a length        O(100 n)          yes [1]_
:func:`entropy`               how evenly persistence is spread            O(n)              yes
:func:`wasserstein`           cost of matching two diagrams: H0           O(n log n)        yes
..                            with the diagonal                           O(n³)             yes
:func:`bottleneck`            farthest that a bar must move               O(n^2.5 log n)    yes
:func:`sliced_wasserstein`    the first, along lines                      O(50 n log n)     yes
:func:`edge_matching`         lengths of both trees' edges (TopoAE)       O(n² d)           yes
:func:`rtd_lite`              when the same clusters form (RTD-Lite)      O(n² d)           yes
:func:`ultrametric`           when two points fall into one cluster       O(n² d)           yes
:func:`persistence_weighted`  lengths of edges, those of long bars most   O(n² d)           yes
:class:`RipsNet`              a guess at an image or vector               O(n d²)           yes
:class:`DistanceNet`          a better one, from distances                O(n² d)           yes
============================  ==========================================  ================  =======

"Differs" tells whether gradients reach the points. The four comparisons in the middle know which
point is which, see :mod:`topkd.topology.matched`. This package imports nothing else of topkd.

.. [1] Where smoothing is asked for.
"""

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
from topkd.topology.scaling import length_unit
from topkd.topology.serialization import VectorizationLayer, lost_mass

__all__ = [
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
    "VectorizationLayer",
    "bottleneck",
    "edge_lengths",
    "edge_matching",
    "entropy",
    "fidelity",
    "length_unit",
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
