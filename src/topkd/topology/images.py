"""Persistence diagrams as vectors of fixed size, whose parameters are fitted once and stored.

:class:`PersistenceImage` is a picture of births against persistences: as the field defines it,
as GUDHI samples it, or as the TopKD paper fits that. In H0 all births are 0, so that the columns of
an image are equal: TopKD's 20 x 20 pixels hold 20 numbers. :class:`PersistenceVector` says the same
in 20 numbers, and reads lengths in units of their mean, so that networks of different widths
compare. :mod:`topkd.topology.curves` has functions of length.

How they are stored is told in :mod:`topkd.topology.serialization`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from topkd.topology.rips import Diagrams
from topkd.topology.scaling import (
    MARGIN,
    Unit,
    check_choice,
    check_positive,
    check_range,
    detached,
    measured,
)

Sampling = Literal["density", "integral"]
Weight = Literal["topkd", "persistence", "one"]

WEIGHTS: Mapping[Weight, Callable[[Tensor, Tensor], Tensor]] = {
    "topkd": lambda births, persistence: 10 * persistence.tanh() + 10 * (100 * births + 1).log(),
    "persistence": lambda births, persistence: persistence,
    "one": lambda births, persistence: (persistence > 0).to(persistence.dtype),
}
"""What a bar counts, by its birth and persistence. Only "persistence" is 0 on the diagonal in every
dimension, which stability needs; "topkd" is in H0. All are 0 at (0, 0), where padding is."""


@dataclass(frozen=True)
class PersistenceImage:
    r"""The persistence image: a weighted sum of Gaussians over births and persistences.

    .. math:: \rho(x, y) = \sum_k w(b_k, p_k) \frac{1}{2 \pi \sigma^2}
        \exp\Big({-\frac{(x - b_k)^2 + (y - p_k)^2}{2 \sigma^2}}\Big)

    over the bars with birth :math:`b` and persistence :math:`p`. A pixel is, after division by the
    scale,

    * "integral": the integral of :math:`\rho` over its cell, as the authors of persistence images
      define it. The ranges end at edges of cells. :meth:`fit_cells` fits this.
    * "density": :math:`\rho` at a node, which is what GUDHI computes. The ranges end at nodes.
      :meth:`fit` fits this as the authors of TopKD do. A density times the area of a cell is a good
      integral while :math:`\sigma` is a cell or more: it is off by 3 % at one, by 64 % at a
      quarter. Narrower Gaussians fall between the nodes; nothing warns of that, as the authors' own
      fit may do it.

    What a bar counts, :math:`w`, is :math:`10 \tanh p + 10 \ln(100 b + 1)` for "topkd", :math:`p`
    for "persistence" and 1 for "one". Only with "persistence" do short bars fade out in every
    dimension: :math:`w(1, 0) = 46` for "topkd".

    Args:
        births: Range of the births, lowest and highest; for densities they may be equal.
        persistences: Range of the persistences, likewise.
        sigma: Standard deviation of the Gaussians, in the unit.
        scale: What images are divided by: the greatest pixel of the clouds it was fitted on.
        resolution: Number of cells or nodes on each side.
        sampling: What a pixel is.
        weight: What a bar counts.
        unit: Of all lengths: "none", or the "mean", "median" or "max" of the deaths of each cloud,
            see :func:`topkd.topology.scaling.length_unit`.
        detach_unit: Whether the gradient takes the unit for a constant. If not, it passes through.

    Raises:
        ValueError: If sigma, scale or resolution is not positive, a range is none, or a name is not
            among these.

    References:
        Persistence Images (Adams et al., JMLR 2017)
        https://jmlr.org/papers/v18/16-337.html
        Do Topological Characteristics Help in Knowledge Distillation? (Kim et al., ICML 2024)
        https://proceedings.mlr.press/v235/kim24aj.html

    Examples:
        >>> from topkd.topology import rips
        >>> clouds = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> image = PersistenceImage.fit(rips(clouds))
        >>> pixels = image(rips(clouds))  # rows are persistence, flattened row by row
        >>> pixels.shape, round(pixels.max().item(), 6)
        (torch.Size([10, 400]), 1.0)
        >>> loops = rips(clouds, max_dim=1).of(1)
        >>> PersistenceImage.fit_cells(loops, resolution=10)(loops).shape
        torch.Size([10, 100])
    """

    births: tuple[float, float]
    persistences: tuple[float, float]
    sigma: float
    scale: float = 1.0
    resolution: int = 20
    sampling: Sampling = "density"
    weight: Weight = "topkd"
    unit: Unit = "none"
    detach_unit: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "sigma", "scale", "resolution")
        check_choice(self, "sampling", get_args(Sampling))
        check_choice(self, "weight", WEIGHTS)
        check_choice(self, "unit", get_args(Unit))
        for name in ("births", "persistences"):
            low, high = getattr(self, name)
            if self.sampling == "integral" or low != high:
                check_range(self, name)

    @property
    def size(self) -> int:
        """How many numbers describe one diagram."""
        return self.resolution**2

    @classmethod
    def fit(cls, diagrams: Diagrams, *, resolution: int = 20) -> PersistenceImage:
        """Chooses range, width and scale of densities as the authors of TopKD do.

        The width is the 0.2-quantile of the distances, above 1e-5, between the first 200 points.

        Args:
            diagrams: Of clouds that the teacher makes of training images, (clouds, bars, 2).
            resolution: Number of nodes on each side.

        Raises:
            ValueError: If all of the first 200 bars are equal, so that there is no width.
        """
        points = _points(diagrams, "none")
        distances = torch.nn.functional.pdist(points[:200])
        distances = distances[distances > 1e-5]
        if len(distances) == 0:
            raise ValueError("the first 200 bars are equal: a persistence image needs a width")
        low, high = points.amin(0).tolist(), points.amax(0).tolist()
        sigma = distances.quantile(0.2).item()
        image = cls((low[0], high[0]), (low[1], high[1]), sigma, 1.0, resolution)
        return replace(image, scale=image(detached(diagrams)).max().item())

    @classmethod
    def fit_cells(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 20,
        weight: Weight = "persistence",
        unit: Unit = "none",
        detach_unit: bool = False,
    ) -> PersistenceImage:
        """Chooses range, width and scale of integrals over cells.

        The width is the longer side of a cell. Births reach three widths beyond those of the
        diagrams, persistences from 0 to three widths beyond the greatest: there a student that is
        spread otherwise than its teacher still finds a gradient.

        Args:
            diagrams: Of clouds that the teacher makes of training images, of dimension 1 or more.
            resolution: Number of cells on each side.
            weight: What a bar counts.
            unit: Of all lengths.
            detach_unit: Whether the gradient takes the unit for a constant.

        Raises:
            ValueError: If there is no bar, if all births are 0, or there are too few cells.
        """
        if resolution <= 2 * MARGIN:
            raise ValueError(f"resolution must be more than {2 * MARGIN}, got {resolution}")
        points = _points(diagrams, unit)
        if len(points) == 0:
            raise ValueError("there is no bar of any length: a persistence image needs a range")
        low, high = points.amin(0).tolist(), points.amax(0).tolist()
        if low[0] == high[0] == 0:
            raise ValueError(
                "all births are 0, so that columns would say the same: use a PersistenceVector"
            )
        sigma = max((high[0] - low[0]) / (resolution - 2 * MARGIN), high[1] / (resolution - MARGIN))
        births = low[0] - MARGIN * sigma, high[0] + MARGIN * sigma
        persistences = 0.0, high[1] + MARGIN * sigma
        image = cls(
            births, persistences, sigma, 1.0, resolution, "integral", weight, unit, detach_unit
        )
        return replace(image, scale=image(detached(diagrams)).max().item())

    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes the images of diagrams, (clouds, resolution²), rows of persistence."""
        births, deaths = measured(diagrams, self.unit, detach_unit=self.detach_unit)
        persistence = deaths - births
        weight = WEIGHTS[self.weight](births, persistence)
        sample, peak = _cells, 1.0
        if self.sampling == "density":
            sample, peak = _nodes, 2 * math.pi * self.sigma**2
        columns = sample(births, self.births, self.resolution, self.sigma)
        rows = sample(persistence, self.persistences, self.resolution, self.sigma)
        with _unrounded(weight):
            pixels = torch.einsum("...k,...kr,...kc->...rc", weight, rows, columns)
        return pixels.flatten(-2) / (peak * self.scale)

    def masses(self, diagrams: Diagrams) -> tuple[Tensor, Tensor]:
        """Weights of all bars, and again, 0 for those outside the ranges, both (clouds, bars)."""
        births, deaths = measured(diagrams, self.unit, detach_unit=self.detach_unit)
        persistence = deaths - births
        weight = WEIGHTS[self.weight](births, persistence)
        inside = _inside(births, self.births) & _inside(persistence, self.persistences)
        return weight, weight * inside


@dataclass(frozen=True)
class PersistenceVector:
    r"""A diagram as a smoothed histogram of its persistences, by default in units of their mean.

    .. math:: v_i = \frac{1}{s} \sum_k w(p_k)
        \Big[\Phi\Big(\frac{u_{i+1} - p_k}{\sigma}\Big)
        - \Phi\Big(\frac{u_i - p_k}{\sigma}\Big)\Big],
        \qquad p_k = (d_k - b_k) \Big/ \frac{1}{n-1} \sum_j d_j

    with cells :math:`[u_i, u_{i+1}]` and the normal distribution function :math:`\Phi`. Each bar
    counts by its persistence, :math:`w(p) = p`, so that bars of length zero count nothing. A cloud
    whose points coincide gives zeros. In higher dimensions it is what is left of a persistence
    image if births are forgotten.

    Args:
        persistences: Lowest and highest cell edge, in the unit.
        sigma: Width of the smoothing, in the unit.
        scale: What vectors are divided by: the greatest entry of the clouds it was fitted on.
        resolution: Number of cells.
        weight: What a bar counts, as in :class:`PersistenceImage`.
        unit: Of all lengths: the "mean", "median" or "max" of the deaths of each cloud, or "none".
        detach_unit: Whether the gradient takes the unit for a constant. If not, it passes through,
            and making a cloud larger has no gradient, as it has no effect.

    Raises:
        ValueError: If sigma, scale or resolution is not positive, the range is empty, or a name is
            not among these.

    References:
        Persistence Images (Adams et al., JMLR 2017)
        https://jmlr.org/papers/v18/16-337.html

    Examples:
        >>> from topkd.topology import rips
        >>> clouds = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> vector = PersistenceVector.fit(rips(clouds))
        >>> vector(rips(clouds)).shape
        torch.Size([10, 20])
        >>> torch.allclose(vector(rips(3 * clouds)), vector(rips(clouds)), atol=1e-5)
        True
    """

    persistences: tuple[float, float]
    sigma: float
    scale: float = 1.0
    resolution: int = 20
    weight: Weight = "persistence"
    unit: Unit = "mean"
    detach_unit: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "sigma", "scale", "resolution")
        check_range(self, "persistences")
        check_choice(self, "weight", WEIGHTS)
        check_choice(self, "unit", get_args(Unit))

    @property
    def size(self) -> int:
        """How many numbers describe one diagram."""
        return self.resolution

    @classmethod
    def fit(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 20,
        weight: Weight = "persistence",
        unit: Unit = "mean",
        detach_unit: bool = False,
    ) -> PersistenceVector:
        """Chooses range, width and scale from several diagrams.

        The width is one cell; the range reaches from 0 to the greatest persistence and three widths
        beyond, where a student that is spread more widely than its teacher still finds a gradient.

        Args:
            diagrams: Of clouds that the teacher makes of training images, (clouds, bars, 2).
            resolution: Number of cells.
            weight: What a bar counts.
            unit: Of all lengths.
            detach_unit: Whether the gradient takes the unit for a constant.

        Raises:
            ValueError: If there is no bar, or only bars of length zero, or too few cells.
        """
        if resolution <= MARGIN:
            raise ValueError(f"resolution must be more than {MARGIN}, got {resolution}")
        points = _points(diagrams, unit)
        if len(points) == 0:
            raise ValueError("there is no bar of any length: a persistence vector needs a range")
        cell = points[:, 1].max().item() / (resolution - MARGIN)
        ends = 0.0, resolution * cell
        vector = cls(ends, cell, 1.0, resolution, weight, unit, detach_unit)
        return replace(vector, scale=vector(detached(diagrams)).max().item())

    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes the vectors of diagrams, (clouds, resolution)."""
        births, deaths = measured(diagrams, self.unit, detach_unit=self.detach_unit)
        persistence = deaths - births
        weight = WEIGHTS[self.weight](births, persistence)
        cells = _cells(persistence, self.persistences, self.resolution, self.sigma)
        with _unrounded(weight):
            return torch.einsum("...k,...ki->...i", weight, cells) / self.scale

    def masses(self, diagrams: Diagrams) -> tuple[Tensor, Tensor]:
        """Weights of all bars, and again, 0 for those outside the range, both (clouds, bars)."""
        births, deaths = measured(diagrams, self.unit, detach_unit=self.detach_unit)
        weight = WEIGHTS[self.weight](births, deaths - births)
        return weight, weight * _inside(deaths - births, self.persistences)


def _unrounded(values: Tensor) -> torch.autocast:
    """Sums in the type of the values, also under autocast, where matrices become half precision."""
    return torch.autocast(values.device.type, enabled=False)


def _points(diagrams: Diagrams, unit: Unit) -> Tensor:
    """Births and persistences of all bars of all diagrams, (bars, 2), float64, no gradient."""
    births, deaths = measured(detached(diagrams), unit, detach_unit=True)
    return torch.stack([births, deaths - births], dim=-1)[deaths > births]


def _nodes(values: Tensor, ends: tuple[float, float], count: int, sigma: float) -> Tensor:
    """Gaussians around values (..., k) at nodes, with a peak of 1, (..., k, nodes)."""
    nodes = torch.linspace(*ends, count, dtype=values.dtype, device=values.device)
    return (-0.5 * ((nodes - values[..., None]) / sigma).square()).exp()


def _cells(values: Tensor, ends: tuple[float, float], count: int, sigma: float) -> Tensor:
    """What of Gaussians around values (..., k) falls into each cell, (..., k, cells)."""
    edges = torch.linspace(*ends, count + 1, dtype=values.dtype, device=values.device)
    return torch.special.ndtr((edges - values[..., None]) / sigma).diff(dim=-1)


def _inside(values: Tensor, ends: tuple[float, float]) -> Tensor:
    return (ends[0] <= values) & (values <= ends[1])
