"""Persistence images and persistence vectors, which are fitted once and stored.

:class:`PersistenceImage` is a weighted sum of Gaussians over births and persistences: integrated
over cells as in the definition, or sampled at nodes as GUDHI and the TopKD paper do. In H0 all
births are 0, so the columns of an image are equal: TopKD's 20 x 20 pixels hold 20 distinct numbers.
:class:`PersistenceVector` holds the same information in 20 numbers, and is scale-invariant by
default, so networks of different widths can be compared. :mod:`topkd.topology.curves` has functions
of length, and :mod:`topkd.topology.serialization` stores vectorizations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from topkd.topology._validation import check_choice, check_positive, check_range
from topkd.topology.rips import Diagrams
from topkd.topology.scaling import DiagramScale, TreeScale, normalized_bars
from topkd.topology.vectorization import MARGIN, Vectorization, detached

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11

Sampling = Literal["density", "integral"]
Weight = Literal["topkd", "persistence", "one"]

WEIGHTS: Mapping[Weight, Callable[[Tensor, Tensor], Tensor]] = {
    "topkd": lambda births, persistence: 10 * persistence.tanh() + 10 * (100 * births + 1).log(),
    "persistence": lambda births, persistence: persistence,
    "one": lambda births, persistence: (persistence > 0).to(persistence.dtype),
}
"""Weight of a bar as a function of birth and persistence. Stability requires weights that vanish on
the diagonal: "persistence" does in every dimension, "topkd" only in H0. All vanish at (0, 0), which
is padding."""


@dataclass(frozen=True)
class PersistenceImage(Vectorization):
    r"""The persistence image: a weighted sum of Gaussians over births and persistences.

    .. math:: \rho(x, y) = \sum_k w(b_k, p_k) \frac{1}{2 \pi \sigma^2}
        \exp\Big({-\frac{(x - b_k)^2 + (y - p_k)^2}{2 \sigma^2}}\Big)

    over the bars with birth :math:`b` and persistence :math:`p`. Pixels are divided by the
    normalizer. Two kinds of sampling are supported:

    * "integral": the integral of :math:`\rho` over each cell, which is the definition of
      persistence images. The ranges end at cell edges. :meth:`fit_cells` fits this kind.
    * "density": :math:`\rho` at each node, which GUDHI computes. The ranges end at nodes.
      :meth:`fit` fits this kind as the authors of TopKD do. A density times the area of a cell
      approximates the integral if :math:`\sigma` is at least one cell: the error is 3 % at one
      cell and 64 % at a quarter. Narrower Gaussians fall between the nodes. There is no warning,
      because the authors' own fit can produce them.

    The weight :math:`w` of a bar is :math:`10 \tanh p + 10 \ln(100 b + 1)` for "topkd", :math:`p`
    for "persistence" and 1 for "one". Short bars vanish in every dimension
    only with "persistence": :math:`w(1, 0) = 46` for "topkd".

    Args:
        births: Range of births, low and high; for densities they may be equal.
        persistences: Range of persistences, likewise.
        sigma: Standard deviation of the Gaussians, in the unit of the ranges.
        normalizer: Pixels are divided by this number; ``fit`` sets it to the greatest pixel over
            the training diagrams.
        resolution: Number of cells or nodes per side.
        sampling: "density" or "integral".
        weight: Weight of a bar: "topkd", "persistence" or "one".
        scale: Scale of births and deaths, see :mod:`topkd.topology.scaling`.
        detach_scale: Whether the scale is a constant for the gradient.

    Raises:
        ValueError: If sigma, normalizer or resolution is not positive, a range is empty, or an
            option is unknown.

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

    name = "image"
    default_scale: ClassVar[TreeScale] = "none"

    births: tuple[float, float]
    persistences: tuple[float, float]
    sigma: float
    normalizer: float = 1.0
    resolution: int = 20
    sampling: Sampling = "density"
    weight: Weight = "topkd"
    scale: DiagramScale = "none"
    detach_scale: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "sigma", "normalizer", "resolution")
        check_choice("sampling", self.sampling, get_args(Sampling))
        check_choice("weight", self.weight, WEIGHTS)
        check_choice("scale", self.scale, get_args(DiagramScale))
        for name in ("births", "persistences"):
            low, high = getattr(self, name)
            if self.sampling == "integral" or low != high:
                check_range(self, name)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.resolution**2

    @classmethod
    def fit(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 20,
        scale: DiagramScale = "none",
        detach_scale: bool = False,
    ) -> Self:
        """Chooses ranges, sigma and normalization of densities as the authors of TopKD do.

        Sigma is the 0.2-quantile of the distances above 1e-5 between the first 200 bars, as points
        of births and persistences.

        Args:
            diagrams: Diagrams of the teacher on training data.
            resolution: Number of nodes per side.
            scale: Scale of births and deaths.
            detach_scale: Whether the scale is a constant for the gradient.

        Raises:
            ValueError: If the first 200 bars are equal and do not determine sigma.
        """
        points = _points(diagrams, scale)
        distances = torch.nn.functional.pdist(points[:200])
        distances = distances[distances > 1e-5]
        if len(distances) == 0:
            raise ValueError("the first 200 bars are equal and do not determine sigma")
        low, high = points.amin(0).tolist(), points.amax(0).tolist()
        sigma = distances.quantile(0.2).item()
        image = cls((low[0], high[0]), (low[1], high[1]), sigma, 1.0, resolution)
        image = replace(image, scale=scale, detach_scale=detach_scale)
        return replace(image, normalizer=image(detached(diagrams)).max().item())

    @classmethod
    def fit_cells(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 20,
        weight: Weight = "persistence",
        scale: DiagramScale = "none",
        detach_scale: bool = False,
    ) -> Self:
        """Chooses ranges, sigma and normalization of integrals over cells.

        Sigma is the longer side of a cell. The range of births extends three sigmas beyond those
        of the diagrams, and persistences range from 0 to three sigmas beyond the greatest. In this
        margin, a student whose diagrams differ from its teacher's still has a gradient.

        Args:
            diagrams: Diagrams of the teacher on training data, of dimension 1 or more.
            resolution: Number of cells per side.
            weight: Weight of a bar.
            scale: Scale of births and deaths.
            detach_scale: Whether the scale is a constant for the gradient.

        Raises:
            ValueError: If there are no bars, all births are 0, or there are too few cells.
        """
        if resolution <= 2 * MARGIN:
            raise ValueError(f"resolution must be more than {2 * MARGIN}, got {resolution}")
        points = _points(diagrams, scale)
        if len(points) == 0:
            raise ValueError("all bars have length zero: a persistence image needs a range")
        low, high = points.amin(0).tolist(), points.amax(0).tolist()
        if low[0] == high[0] == 0:
            raise ValueError(
                "all births are 0, so all columns would be equal: use a PersistenceVector"
            )
        sigma = max((high[0] - low[0]) / (resolution - 2 * MARGIN), high[1] / (resolution - MARGIN))
        births = low[0] - MARGIN * sigma, high[0] + MARGIN * sigma
        persistences = 0.0, high[1] + MARGIN * sigma
        image = cls(
            births, persistences, sigma, 1.0, resolution, "integral", weight, scale, detach_scale
        )
        return replace(image, normalizer=image(detached(diagrams)).max().item())

    @classmethod
    def fit_dimension(cls, diagrams: Diagrams, dimension: int, *, scale: DiagramScale) -> Self:
        """Fits densities as TopKD does in H0, and integrals weighted by persistence above.

        Raises:
            ValueError: If these diagrams do not determine the parameters.
        """
        fit = cls.fit if dimension == 0 else cls.fit_cells
        return fit(diagrams, scale=scale)

    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes images, (clouds, resolution²), with rows of constant persistence."""
        births, deaths = normalized_bars(diagrams, self.scale, detach_scale=self.detach_scale)
        persistence = deaths - births
        weight = WEIGHTS[self.weight](births, persistence)
        sample, peak = _cells, 1.0
        if self.sampling == "density":
            sample, peak = _nodes, 2 * math.pi * self.sigma**2
        columns = sample(births, self.births, self.resolution, self.sigma)
        rows = sample(persistence, self.persistences, self.resolution, self.sigma)
        with _full_precision(weight):
            pixels = torch.einsum("...k,...kr,...kc->...rc", weight, rows, columns)
        return pixels.flatten(-2) / (peak * self.normalizer)

    def masses(self, diagrams: Diagrams) -> tuple[Tensor, Tensor]:
        """Computes the weight of each bar, in total and within the ranges, (clouds, bars)."""
        births, deaths = normalized_bars(diagrams, self.scale, detach_scale=self.detach_scale)
        persistence = deaths - births
        weight = WEIGHTS[self.weight](births, persistence)
        inside = _inside(births, self.births) & _inside(persistence, self.persistences)
        return weight, weight * inside


@dataclass(frozen=True)
class PersistenceVector(Vectorization):
    r"""The persistence vector: a smoothed histogram of persistences, scale-invariant by default.

    .. math:: v_i = \frac{1}{s} \sum_k w(p_k)
        \Big[\Phi\Big(\frac{u_{i+1} - p_k}{\sigma}\Big)
        - \Phi\Big(\frac{u_i - p_k}{\sigma}\Big)\Big],
        \qquad p_k = (d_k - b_k) \Big/ \frac{1}{n-1} \sum_j d_j

    with cells :math:`[u_i, u_{i+1}]` and the normal distribution function :math:`\Phi`. Bars are
    weighted by their persistence, :math:`w(p) = p`, so bars of length zero have no effect.
    Coincident points give zeros. In higher dimensions, it is the marginal of a persistence image
    over births.

    Args:
        persistences: First and last cell edge, in units of the scale.
        sigma: Standard deviation of the smoothing, in units of the scale.
        normalizer: Entries are divided by this number; ``fit`` sets it to the greatest entry over
            the training diagrams.
        resolution: Number of cells.
        weight: Weight of a bar, see :class:`PersistenceImage`.
        scale: Scale of births and deaths, see :mod:`topkd.topology.scaling`.
        detach_scale: Whether the scale is a constant for the gradient. By default, gradients pass
            through it, so the size of a cloud has neither an effect nor a gradient.

    Raises:
        ValueError: If sigma, normalizer or resolution is not positive, the range is empty, or an
            option is unknown.

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

    name = "vector"

    persistences: tuple[float, float]
    sigma: float
    normalizer: float = 1.0
    resolution: int = 20
    weight: Weight = "persistence"
    scale: DiagramScale = "death_mean"
    detach_scale: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "sigma", "normalizer", "resolution")
        check_range(self, "persistences")
        check_choice("weight", self.weight, WEIGHTS)
        check_choice("scale", self.scale, get_args(DiagramScale))

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.resolution

    @classmethod
    def fit(
        cls,
        diagrams: Diagrams,
        *,
        resolution: int = 20,
        weight: Weight = "persistence",
        scale: DiagramScale = "death_mean",
        detach_scale: bool = False,
    ) -> Self:
        """Chooses range, sigma and normalization from training diagrams.

        Sigma is one cell. The range extends from 0 to three cells beyond the greatest persistence;
        in this margin, a student with longer bars than its teacher still has a gradient.

        Args:
            diagrams: Diagrams of the teacher on training data.
            resolution: Number of cells.
            weight: Weight of a bar.
            scale: Scale of births and deaths.
            detach_scale: Whether the scale is a constant for the gradient.

        Raises:
            ValueError: If all bars have length zero, or there are too few cells.
        """
        if resolution <= MARGIN:
            raise ValueError(f"resolution must be more than {MARGIN}, got {resolution}")
        points = _points(diagrams, scale)
        if len(points) == 0:
            raise ValueError("all bars have length zero: a persistence vector needs a range")
        cell = points[:, 1].max().item() / (resolution - MARGIN)
        ends = 0.0, resolution * cell
        vector = cls(ends, cell, 1.0, resolution, weight, scale, detach_scale)
        return replace(vector, normalizer=vector(detached(diagrams)).max().item())

    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes vectors, (clouds, resolution)."""
        births, deaths = normalized_bars(diagrams, self.scale, detach_scale=self.detach_scale)
        persistence = deaths - births
        weight = WEIGHTS[self.weight](births, persistence)
        cells = _cells(persistence, self.persistences, self.resolution, self.sigma)
        with _full_precision(weight):
            return torch.einsum("...k,...ki->...i", weight, cells) / self.normalizer

    def masses(self, diagrams: Diagrams) -> tuple[Tensor, Tensor]:
        """Computes the weight of each bar, in total and within the range, (clouds, bars)."""
        births, deaths = normalized_bars(diagrams, self.scale, detach_scale=self.detach_scale)
        weight = WEIGHTS[self.weight](births, deaths - births)
        return weight, weight * _inside(deaths - births, self.persistences)


def _full_precision(values: Tensor) -> torch.autocast:
    """Disables autocast, which would compute sums over bars in half precision."""
    return torch.autocast(values.device.type, enabled=False)


def _points(diagrams: Diagrams, scale: DiagramScale) -> Tensor:
    """Births and persistences of all bars, (bars, 2), detached, in float64."""
    births, deaths = normalized_bars(detached(diagrams), scale, detach_scale=True)
    return torch.stack([births, deaths - births], dim=-1)[deaths > births]


def _nodes(values: Tensor, ends: tuple[float, float], count: int, sigma: float) -> Tensor:
    """Gaussians centered at values (..., k), with peak 1, at nodes, (..., k, nodes)."""
    nodes = torch.linspace(*ends, count, dtype=values.dtype, device=values.device)
    return (-0.5 * ((nodes - values[..., None]) / sigma).square()).exp()


def _cells(values: Tensor, ends: tuple[float, float], count: int, sigma: float) -> Tensor:
    """Mass of Gaussians centered at values (..., k) in each cell, (..., k, cells)."""
    edges = torch.linspace(*ends, count + 1, dtype=values.dtype, device=values.device)
    return torch.special.ndtr((edges - values[..., None]) / sigma).diff(dim=-1)


def _inside(values: Tensor, ends: tuple[float, float]) -> Tensor:
    return (ends[0] <= values) & (values <= ends[1])
