"""Persistence diagrams as functions of length, read at a grid of nodes.

=========================  ==============================================  ==================
what                       value at a length t                             gradient
=========================  ==============================================  ==================
:class:`BettiCurve`        how many bars are open                          only if smoothed
:class:`Landscape`         the k-th greatest tent, of several k            almost everywhere
:class:`Silhouette`        the mean tent, weighted                         almost everywhere
:class:`EntropyCurve`      what the open bars add to the entropy           smoothed: all of it
:func:`entropy`            one number: how evenly lengths are shared out   everywhere
=========================  ==============================================  ==================

The tent of a bar rises from 0 at its birth to half its length and falls to 0 at its death. Curves,
as images and vectors do, take diagrams of one dimension and leave out padding and bars of length
zero; see :class:`Curve` for what they have in common and :func:`length_unit` for units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.topology.gradient import in_units
from topkd.topology.rips import Diagrams
from topkd.topology.scaling import (
    MARGIN,
    Unit,
    check_choice,
    check_not_negative,
    check_positive,
    check_range,
    detached,
    measured,
)

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on


@dataclass(frozen=True)
class Curve(ABC):
    """What all curves have in common: where they are read, in which unit, what they are divided by.

    Args:
        lengths: The lowest and the highest node. What bars do outside is not seen, and has no
            gradient; see :func:`topkd.topology.serialization.lost_mass`.
        resolution: Number of nodes, both ends included.
        scale: What values are divided by; ``fit`` takes the greatest of the clouds it sees.
        unit: Of births, deaths and nodes: "none", or the "mean", "median" or "max" of the deaths
            of each cloud.
        detach_unit: Whether the gradient takes the unit for a constant. If not, it passes through,
            and making a cloud larger has no gradient, as it has no effect.

    Raises:
        ValueError: If the range is empty, a number that must be positive is not, or the unit is
            none of these.
    """

    lengths: tuple[float, float]
    resolution: int = 100
    scale: float = 1.0
    unit: Unit = "none"
    detach_unit: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "resolution", "scale")
        check_range(self, "lengths")
        check_choice(self, "unit", get_args(Unit))

    @property
    def size(self) -> int:
        """How many numbers describe one diagram."""
        return self.resolution

    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes the curves of diagrams, (clouds, size)."""
        births, deaths = measured(diagrams, self.unit, detach_unit=self.detach_unit)
        nodes = torch.linspace(
            *self.lengths, self.resolution, dtype=births.dtype, device=births.device
        )
        return self._values(nodes, births[..., None], deaths[..., None]) / self.scale

    @abstractmethod
    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        """Values at nodes (nodes) of bars (..., bars, 1), which are 0 and 0 in padding."""

    def masses(self, diagrams: Diagrams) -> tuple[Tensor, Tensor]:
        """Lengths of all bars, and of what of them lies between the ends, both (clouds, bars)."""
        births, deaths = measured(diagrams, self.unit, detach_unit=self.detach_unit)
        low, high = self.lengths
        return deaths - births, deaths.clamp(low, high) - births.clamp(low, high)


AnyCurve = TypeVar("AnyCurve", bound=Curve)


@dataclass(frozen=True)
class BettiCurve(Curve):
    r"""How many classes are alive at each length.

    .. math:: \beta(t) = \#\{k : b_k \le t < d_k\}

    It is piecewise constant: its gradient is zero almost everywhere, and none is given. Smoothing
    by a Gaussian gives one, and the same area:

    .. math:: \beta_\sigma(t) = \sum_k \Phi\Big(\frac{t - b_k}{\sigma}\Big)
        - \Phi\Big(\frac{t - d_k}{\sigma}\Big)

    Args:
        lengths, resolution, scale, unit, detach_unit: As in :class:`Curve`.
        sigma: Standard deviation of the smoothing, in the unit; 0 is none.

    Raises:
        ValueError: If a parameter is impossible.

    References:
        Topology and data (Carlsson, 2009), for Betti numbers along a filtration
        https://doi.org/10.1090/S0273-0979-09-01249-X

    Examples:
        >>> from topkd.topology import rips
        >>> square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> BettiCurve((0.0, 2.0), resolution=5)(rips(square))  # the last one never dies
        tensor([3., 3., 0., 0., 0.])
    """

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
        unit: Unit = "none",
        detach_unit: bool = False,
        smoothing: float = 1.0,
    ) -> Self:
        """Chooses range, width and scale from several diagrams.

        The range reaches from the first birth to the last death and three steps beyond, but not
        below 0.

        Args:
            diagrams: Of clouds that the teacher makes of training images.
            resolution: Number of nodes.
            unit: As in :class:`Curve`.
            detach_unit: As in :class:`Curve`.
            smoothing: Width of the smoothing in steps of the grid; 0 is none, and no gradient.

        Raises:
            ValueError: If there is no bar of any length, or too few nodes.
        """
        lengths = _span(diagrams, resolution, unit)
        sigma = smoothing * (lengths[1] - lengths[0]) / (resolution - 1)
        return _to_greatest(cls(lengths, resolution, 1.0, unit, detach_unit, sigma), diagrams)

    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        return _open(nodes, births, deaths, self.sigma).sum(-2)


@dataclass(frozen=True)
class Landscape(Curve):
    r"""The greatest tents at each length, the second greatest, and so on.

    .. math:: \lambda_k(t) = \operatorname*{kmax}_j \, \max(0, \min(t - b_j, d_j - t))

    Layers follow one another in the result, the greatest first; reshape it by
    ``unflatten(-1, (layers, resolution))``. Layers beyond the number of bars are 0. GUDHI's are
    these times the root of 2.

    Args:
        lengths, resolution, scale, unit, detach_unit: As in :class:`Curve`.
        layers: How many.

    Raises:
        ValueError: If a parameter is impossible.

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

    layers: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "layers")

    @property
    def size(self) -> int:
        """How many numbers describe one diagram."""
        return self.layers * self.resolution

    @classmethod
    def fit(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 100,
        unit: Unit = "none",
        detach_unit: bool = False,
        layers: int = 5,
    ) -> Landscape:
        """Chooses range and scale from several diagrams, as :meth:`BettiCurve.fit` does.

        Args:
            diagrams: Of clouds that the teacher makes of training images.
            resolution: Number of nodes.
            unit: As in :class:`Curve`.
            detach_unit: As in :class:`Curve`.
            layers: How many.

        Raises:
            ValueError: If there is no bar of any length, or too few nodes.
        """
        lengths = _span(diagrams, resolution, unit)
        return _to_greatest(cls(lengths, resolution, 1.0, unit, detach_unit, layers), diagrams)

    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        tents = F.pad(_tents(nodes, births, deaths), (0, 0, 0, self.layers))
        return tents.topk(self.layers, dim=-2).values.flatten(-2)


@dataclass(frozen=True)
class Silhouette(Curve):
    r"""The mean of all tents, weighted by a power of the persistence.

    .. math:: \phi(t) = \frac{\sum_k p_k^q \max(0, \min(t - b_k, d_k - t))}{\sum_k p_k^q}

    A large power tells of the longest bars, a small one of all. GUDHI's are these times the root
    of 2.

    Args:
        lengths, resolution, scale, unit, detach_unit: As in :class:`Curve`.
        power: The exponent q, not negative.

    Raises:
        ValueError: If a parameter is impossible.

    References:
        Stochastic convergence of persistence landscapes and silhouettes (Chazal et al., 2014)
        https://arxiv.org/abs/1312.0308

    Examples:
        >>> bars = torch.tensor([[0.0, 4.0], [1.0, 3.0]])
        >>> Silhouette((0.0, 4.0), resolution=5, power=0.0)(Diagrams.from_bars(bars))
        tensor([0.0000, 0.5000, 1.5000, 0.5000, 0.0000])
    """

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
        unit: Unit = "none",
        detach_unit: bool = False,
        power: float = 1.0,
    ) -> Silhouette:
        """Chooses range and scale from several diagrams, as :meth:`BettiCurve.fit` does.

        Args:
            diagrams: Of clouds that the teacher makes of training images.
            resolution: Number of nodes.
            unit: As in :class:`Curve`.
            detach_unit: As in :class:`Curve`.
            power: As in the class.

        Raises:
            ValueError: If there is no bar of any length, or too few nodes.
        """
        lengths = _span(diagrams, resolution, unit)
        return _to_greatest(cls(lengths, resolution, 1.0, unit, detach_unit, power), diagrams)

    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        persistence = deaths - births
        bars = persistence > 0  # a power below 1 has no derivative at 0
        # Only ratios count: of the longest bar, no power is too large or too small for a float.
        longest = F.pad(persistence.detach(), (0, 0, 0, 1)).amax(-2, keepdim=True)
        relative = persistence / longest.where(longest > 0, 1)
        weights = relative.where(bars, 1).pow(self.power).where(bars, 0)
        total = weights.sum(-2)
        summed = (weights * _tents(nodes, births, deaths)).sum(-2)
        return summed / total.where(total > 0, 1)


@dataclass(frozen=True)
class EntropyCurve(BettiCurve):
    r"""The Betti curve in which each bar counts by what it adds to the persistence entropy.

    .. math:: S(t) = -\sum_{k : b_k \le t < d_k} q_k \log q_k,
        \qquad q_k = p_k \Big/ \sum_j p_j

    Its gradient sees how long bars are, but when they are born and die only if it is smoothed.
    GUDHI's is this one, not normalized. Parameters and ``fit`` are those of :class:`BettiCurve`.

    References:
        On the stability of persistent entropy and new summary functions (Atienza et al., 2020)
        https://arxiv.org/abs/1803.08304

    Examples:
        >>> bars = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
        >>> EntropyCurve((0.0, 3.0), resolution=4)(Diagrams.from_bars(bars))
        tensor([0.3466, 0.6931, 0.3466, 0.0000])
    """

    def _values(self, nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
        terms = _entropy_terms((deaths - births).squeeze(-1))[..., None]
        return (terms * _open(nodes, births, deaths, self.sigma)).sum(-2)


def entropy(diagrams: Diagrams) -> Tensor:
    r"""Computes the persistence entropy: how evenly the total length is shared among the bars.

    .. math:: E = -\sum_k q_k \log q_k, \qquad q_k = p_k \Big/ \sum_j p_j

    It is log k for k bars of equal length, and does not see the scale of a cloud: a unit would
    change nothing.

    Args:
        diagrams: Of one dimension.

    Returns:
        One number for each cloud, (clouds), in nats; 0 of one bar or none.

    Raises:
        ValueError: If there are bars of more than one dimension.

    References:
        On the stability of persistent entropy and new summary functions (Atienza et al., 2020)
        https://arxiv.org/abs/1803.08304

    Examples:
        >>> entropy(Diagrams.from_bars(torch.tensor([[0.0, 2.0], [1.0, 3.0]])))
        tensor(0.6931)
    """
    births, deaths = measured(diagrams, "none", detach_unit=False)
    return _entropy_terms(deaths - births).sum(-1)


def _entropy_terms(persistence: Tensor) -> Tensor:
    total = persistence.sum(-1, keepdim=True)
    share = in_units(persistence, total)
    share = share.where(share > 0, 1)  # 1 log 1 is 0, and so is the limit at 0
    return -share * share.log()


def _open(nodes: Tensor, births: Tensor, deaths: Tensor, sigma: float) -> Tensor:
    """Whether bars (..., bars, 1) are open at nodes: 0 or 1, or in between if smoothed."""
    if sigma == 0:
        return ((births <= nodes) & (nodes < deaths)).to(births.dtype)
    born = torch.special.ndtr((nodes - births) / sigma)
    return born - torch.special.ndtr((nodes - deaths) / sigma)


def _tents(nodes: Tensor, births: Tensor, deaths: Tensor) -> Tensor:
    return torch.minimum(nodes - births, deaths - nodes).clamp(min=0)


def _span(diagrams: Diagrams, resolution: int, unit: Unit) -> tuple[float, float]:
    """From the first birth to the last death and three steps beyond, but not below 0."""
    if resolution <= 2 * MARGIN + 1:
        raise ValueError(f"resolution must be more than {2 * MARGIN + 1}, got {resolution}")
    births, deaths = measured(detached(diagrams), unit, detach_unit=True)
    bars = deaths > births
    if not bars.any():
        raise ValueError("there is no bar of any length: a curve needs a range")
    low, high = births[bars].min().item(), deaths[bars].max().item()
    margin = MARGIN * (high - low) / (resolution - 1 - 2 * MARGIN)
    return max(low - margin, 0.0), high + margin


def _to_greatest(curve: AnyCurve, diagrams: Diagrams) -> AnyCurve:
    """The same curve with a scale that makes the greatest value of these diagrams 1."""
    scale = curve(detached(diagrams)).max().item()
    if scale <= 0:
        raise ValueError(f"no bar reaches any of the {curve.resolution} nodes: take more of them")
    return replace(curve, scale=scale)
