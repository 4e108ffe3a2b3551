"""Persistence diagrams as functions of length, sampled on a grid.

=========================  ==============================================  ====================
vectorization              value at length t                               gradient
=========================  ==============================================  ====================
:class:`BettiCurve`        number of bars that contain t                   only if smoothed
:class:`Landscape`         k-th largest tent function, for several k       almost everywhere
:class:`Silhouette`        weighted mean of the tent functions             almost everywhere
:class:`EntropyCurve`      entropy of the bars that contain t              complete if smoothed
:func:`entropy`            a single number: persistence entropy            everywhere
=========================  ==============================================  ====================

The tent function of a bar rises from 0 at its birth to half its persistence and falls back to 0 at
its death. Like all vectorizations, curves take diagrams of one dimension and ignore padding and
bars of length zero. :class:`Curve` documents the common parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.topology._validation import (
    check_choice,
    check_not_negative,
    check_positive,
    check_range,
)
from topkd.topology.gradient import bounded_divide
from topkd.topology.rips import Diagrams
from topkd.topology.scaling import DiagramScale, normalized_bars
from topkd.topology.vectorization import MARGIN, Vectorization, detached

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11


@dataclass(frozen=True)
class Curve(Vectorization):
    """Base class of curves: grid, normalization and scale.

    Args:
        lengths: First and last node of the grid. Bars have no effect and no gradient outside; see
            :func:`topkd.topology.serialization.lost_mass`.
        resolution: Number of nodes, including both ends.
        normalizer: Values are divided by this number; ``fit`` sets it to the maximum over the
            training diagrams.
        scale: Scale of births and deaths, see :mod:`topkd.topology.scaling`. The grid is in the
            same unit.
        detach_scale: Whether the scale is a constant for the gradient. By default, gradients pass
            through it, so the size of a cloud has neither an effect nor a gradient.

    Raises:
        ValueError: If the range is empty, a number is not positive, or the scale is not a statistic
            of diagrams.
    """

    lengths: tuple[float, float]
    resolution: int = 100
    normalizer: float = 1.0
    scale: DiagramScale = "none"
    detach_scale: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "resolution", "normalizer")
        check_range(self, "lengths")
        check_choice("scale", self.scale, get_args(DiagramScale))

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.resolution

    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes the curves of diagrams, (clouds, size)."""
        births, deaths = normalized_bars(diagrams, self.scale, detach_scale=self.detach_scale)
        nodes = torch.linspace(
            *self.lengths, self.resolution, dtype=births.dtype, device=births.device
        )
        return self._values(nodes, births[..., None], deaths[..., None]) / self.normalizer

    @abstractmethod
    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        """Evaluates the curve at nodes (nodes) for bars (..., bars, 1); padding is (0, 0)."""

    def masses(self, diagrams: Diagrams) -> tuple[Tensor, Tensor]:
        """Computes the persistence of each bar, in total and within the range, (clouds, bars)."""
        births, deaths = normalized_bars(diagrams, self.scale, detach_scale=self.detach_scale)
        low, high = self.lengths
        return deaths - births, deaths.clamp(low, high) - births.clamp(low, high)


AnyCurve = TypeVar("AnyCurve", bound=Curve)


@dataclass(frozen=True)
class BettiCurve(Curve):
    r"""The Betti curve: the number of homology classes at each length.

    .. math:: \beta(t) = \#\{k : b_k \le t < d_k\}

    The curve is piecewise constant, so its gradient is zero. Gaussian smoothing yields a gradient
    and preserves the area:

    .. math:: \beta_\sigma(t) = \sum_k \Phi\Big(\frac{t - b_k}{\sigma}\Big)
        - \Phi\Big(\frac{t - d_k}{\sigma}\Big)

    Args:
        lengths, resolution, normalizer, scale, detach_scale: See :class:`Curve`.
        sigma: Standard deviation of the smoothing kernel, in the unit of the grid; 0 disables
            smoothing.

    Raises:
        ValueError: If a parameter is invalid.

    References:
        Topology and data (Carlsson, 2009), for Betti numbers along a filtration
        https://doi.org/10.1090/S0273-0979-09-01249-X

    Examples:
        >>> from topkd.topology import rips
        >>> square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> BettiCurve((0.0, 2.0), resolution=5)(rips(square))  # the fourth component never dies
        tensor([3., 3., 0., 0., 0.])
    """

    name = "betti"

    sigma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "sigma")

    @classmethod
    def fit(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 100,
        scale: DiagramScale = "none",
        detach_scale: bool = False,
        smoothing: float = 1.0,
    ) -> Self:
        """Chooses range, smoothing and normalization from training diagrams.

        The range extends from the first birth to the last death plus three grid steps on both
        sides, but not below 0.

        Args:
            diagrams: Diagrams of the teacher on training data.
            resolution: Number of nodes.
            scale: See :class:`Curve`.
            detach_scale: See :class:`Curve`.
            smoothing: Standard deviation of the smoothing in grid steps; 0 disables smoothing, and
                the curve then has no gradient.

        Raises:
            ValueError: If all bars have length zero, or there are too few nodes.
        """
        lengths = _span(diagrams, resolution, scale)
        sigma = smoothing * (lengths[1] - lengths[0]) / (resolution - 1)
        return _normalized(cls(lengths, resolution, 1.0, scale, detach_scale, sigma), diagrams)

    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        return _indicators(nodes, births, deaths, self.sigma).sum(-2)


@dataclass(frozen=True)
class Landscape(Curve):
    r"""The persistence landscape: the largest tent functions at each length.

    .. math:: \lambda_k(t) = \operatorname*{kmax}_j \, \max(0, \min(t - b_j, d_j - t))

    Layers are concatenated, the largest first; ``unflatten(-1, (layers, resolution))`` separates
    them. Layers beyond the number of bars are 0. GUDHI multiplies landscapes by the square root of
    2.

    Args:
        lengths, resolution, normalizer, scale, detach_scale: See :class:`Curve`.
        layers: Number of layers.

    Raises:
        ValueError: If a parameter is invalid.

    References:
        Statistical topological data analysis using persistence landscapes (Bubenik, JMLR 2015)
        https://jmlr.org/papers/v16/bubenik15a.html

    Examples:
        >>> bars = torch.tensor([[0.0, 4.0], [1.0, 3.0]])
        >>> landscape = Landscape((0.0, 4.0), resolution=5, layers=2)
        >>> landscape(Diagrams.from_bars(bars)).unflatten(-1, (2, 5))
        tensor([[0., 1., 2., 1., 0.],
                [0., 0., 1., 0., 0.]])
    """

    name = "landscape"

    layers: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "layers")

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.layers * self.resolution

    @classmethod
    def fit(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 100,
        scale: DiagramScale = "none",
        detach_scale: bool = False,
        layers: int = 5,
    ) -> Self:
        """Chooses range and normalization from training diagrams, as :meth:`BettiCurve.fit`.

        Args:
            diagrams: Diagrams of the teacher on training data.
            resolution: Number of nodes.
            scale: See :class:`Curve`.
            detach_scale: See :class:`Curve`.
            layers: Number of layers.

        Raises:
            ValueError: If all bars have length zero, or there are too few nodes.
        """
        lengths = _span(diagrams, resolution, scale)
        return _normalized(cls(lengths, resolution, 1.0, scale, detach_scale, layers), diagrams)

    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        tents = F.pad(_tents(nodes, births, deaths), (0, 0, 0, self.layers))
        return tents.topk(self.layers, dim=-2).values.flatten(-2)


@dataclass(frozen=True)
class Silhouette(Curve):
    r"""The persistence silhouette: the mean tent function, weighted by a power of persistence.

    .. math:: \phi(t) = \frac{\sum_k p_k^q \max(0, \min(t - b_k, d_k - t))}{\sum_k p_k^q}

    Large powers emphasize long bars; small powers weight all bars similarly. GUDHI multiplies
    silhouettes by the square root of 2.

    Args:
        lengths, resolution, normalizer, scale, detach_scale: See :class:`Curve`.
        power: The exponent q, not negative.

    Raises:
        ValueError: If a parameter is invalid.

    References:
        Stochastic convergence of persistence landscapes and silhouettes (Chazal et al., 2014)
        https://arxiv.org/abs/1312.0308

    Examples:
        >>> bars = torch.tensor([[0.0, 4.0], [1.0, 3.0]])
        >>> Silhouette((0.0, 4.0), resolution=5, power=0.0)(Diagrams.from_bars(bars))
        tensor([0.0000, 0.5000, 1.5000, 0.5000, 0.0000])
    """

    name = "silhouette"

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "power")

    @classmethod
    def fit(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 100,
        scale: DiagramScale = "none",
        detach_scale: bool = False,
        power: float = 1.0,
    ) -> Self:
        """Chooses range and normalization from training diagrams, as :meth:`BettiCurve.fit`.

        Args:
            diagrams: Diagrams of the teacher on training data.
            resolution: Number of nodes.
            scale: See :class:`Curve`.
            detach_scale: See :class:`Curve`.
            power: The exponent q.

        Raises:
            ValueError: If all bars have length zero, or there are too few nodes.
        """
        lengths = _span(diagrams, resolution, scale)
        return _normalized(cls(lengths, resolution, 1.0, scale, detach_scale, power), diagrams)

    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        persistence = deaths - births
        bars = persistence > 0  # powers below 1 have no derivative at 0
        # Ratios to the longest bar neither overflow nor underflow, whatever the power.
        longest = F.pad(persistence.detach(), (0, 0, 0, 1)).amax(-2, keepdim=True)
        relative = persistence / longest.where(longest > 0, 1)
        weights = relative.where(bars, 1).pow(self.power).where(bars, 0)
        total = weights.sum(-2)
        summed = (weights * _tents(nodes, births, deaths)).sum(-2)
        return summed / total.where(total > 0, 1)


@dataclass(frozen=True)
class EntropyCurve(BettiCurve):
    r"""The entropy curve: a Betti curve that weights each bar by its term of the entropy.

    .. math:: S(t) = -\sum_{k : b_k \le t < d_k} q_k \log q_k,
        \qquad q_k = p_k \Big/ \sum_j p_j

    Without smoothing, gradients pass only through the persistence of bars; with smoothing, also
    through the position of births and deaths. It equals GUDHI's entropy without normalization.
    Parameters and ``fit`` are those of :class:`BettiCurve`.

    References:
        On the stability of persistent entropy and new summary functions (Atienza et al., 2020)
        https://arxiv.org/abs/1803.08304

    Examples:
        >>> bars = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
        >>> EntropyCurve((0.0, 3.0), resolution=4)(Diagrams.from_bars(bars))
        tensor([0.3466, 0.6931, 0.3466, 0.0000])
    """

    name = "entropy"

    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        terms = _entropy_terms((deaths - births).squeeze(-1))[..., None]
        return (terms * _indicators(nodes, births, deaths, self.sigma)).sum(-2)


def entropy(diagrams: Diagrams) -> Tensor:
    r"""Computes the persistence entropy: how evenly persistence is distributed over the bars.

    .. math:: E = -\sum_k q_k \log q_k, \qquad q_k = p_k \Big/ \sum_j p_j

    It is log k for k bars of equal length, and invariant to the scale of a cloud.

    Args:
        diagrams: Diagrams of one dimension.

    Returns:
        Entropies in nats, (clouds); 0 for at most one bar.

    Raises:
        ValueError: If there are bars of more than one dimension.

    References:
        On the stability of persistent entropy and new summary functions (Atienza et al., 2020)
        https://arxiv.org/abs/1803.08304

    Examples:
        >>> entropy(Diagrams.from_bars(torch.tensor([[0.0, 2.0], [1.0, 3.0]])))
        tensor(0.6931)
    """
    births, deaths = normalized_bars(diagrams, "none", detach_scale=False)
    return _entropy_terms(deaths - births).sum(-1)


def _entropy_terms(persistence: Tensor) -> Tensor:
    total = persistence.sum(-1, keepdim=True)
    share = bounded_divide(persistence, total)
    share = share.where(share > 0, 1)  # 1 log 1 = 0, the limit of p log p at 0
    return -share * share.log()


def _indicators(nodes: Tensor, births: Tensor, deaths: Tensor, sigma: float) -> Tensor:
    """Indicators of bars (..., bars, 1) at nodes, smoothed if sigma is positive."""
    if sigma == 0:
        return ((births <= nodes) & (nodes < deaths)).to(births.dtype)
    born = torch.special.ndtr((nodes - births) / sigma)
    return born - torch.special.ndtr((nodes - deaths) / sigma)


def _tents(nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
    return torch.minimum(nodes - births, deaths - nodes).clamp(min=0)


def _span(diagrams: Diagrams, resolution: int, scale: DiagramScale) -> tuple[float, float]:
    """Range from the first birth to the last death with a margin, but not below 0."""
    if resolution <= 2 * MARGIN + 1:
        raise ValueError(f"resolution must be more than {2 * MARGIN + 1}, got {resolution}")
    births, deaths = normalized_bars(detached(diagrams), scale, detach_scale=True)
    bars = deaths > births
    if not bars.any():
        raise ValueError("all bars have length zero: a curve needs a range")
    low, high = births[bars].min().item(), deaths[bars].max().item()
    margin = MARGIN * (high - low) / (resolution - 1 - 2 * MARGIN)
    return max(low - margin, 0.0), high + margin


def _normalized(curve: AnyCurve, diagrams: Diagrams) -> AnyCurve:
    """The same curve, normalized to a maximum of 1 over these diagrams."""
    normalizer = curve(detached(diagrams)).max().item()
    if normalizer <= 0:
        raise ValueError(
            f"the curve is 0 at all {curve.resolution} nodes: increase resolution, or use another "
            "vectorization if clouds have a single bar, whose entropy is 0"
        )
    return replace(curve, normalizer=normalizer)
