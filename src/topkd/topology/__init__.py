"""Persistent homology for training loops: torch in, torch out, with gradients.

============================  =======================================  ==================  =======
what                          computes                                 cost of a cloud     differs
============================  =======================================  ==================  =======
:func:`rips`                  exact H0 diagrams of Vietoris-Rips       O(n² d)             yes
:class:`PersistenceVector`    a diagram as 20 numbers, without scale   O(20 n)             yes
:class:`PersistenceImage`     a diagram as TopKD's 20 x 20 image       O(400 n)            yes
:func:`wasserstein`           distance between two diagrams            O(n log n)          yes
:class:`RipsNet`              an approximation of image or vector      O(n d²)             yes
============================  =======================================  ==================  =======

"Differs" tells whether gradients reach the points. This package imports nothing else of topkd.
"""

from topkd.topology.distances import wasserstein
from topkd.topology.images import PersistenceImage, PersistenceVector
from topkd.topology.rips import Diagrams, rips
from topkd.topology.ripsnet import Fidelity, RipsNet

__all__ = [
    "Diagrams",
    "Fidelity",
    "PersistenceImage",
    "PersistenceVector",
    "RipsNet",
    "rips",
    "wasserstein",
]
