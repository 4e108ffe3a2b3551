"""Persistence diagrams as vectors of fixed size, whose parameters are fitted once and stored.

Two forms of H0. :class:`PersistenceImage` is the 20 x 20 image of the TopKD paper. All births being
0, its columns are equal: its 400 pixels hold 20 numbers. :class:`PersistenceVector` says the same
in 20 numbers, and reads lengths in units of their mean, so that networks of different widths
compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from topkd.topology.rips import Diagrams

MARGIN = 3  # cells of a vector beyond the greatest death it was fitted on

Form = Literal["image", "vector"]


@dataclass(frozen=True)
class PersistenceImage:
    r"""The persistence image of TopKD: a weighted sum of Gaussians, read at a grid of nodes.

    .. math:: I_{rc} = \frac{1}{s} \sum_k w(b_k, p_k)
        \frac{1}{2 \pi \sigma^2} \exp\Big({-\frac{(x_c - b_k)^2 + (y_r - p_k)^2}{2 \sigma^2}}\Big)

    over the bars with birth :math:`b` and persistence :math:`p`, where
    :math:`w(b, p) = 10 \tanh p + 10 \ln(100 b + 1)`. The nodes :math:`x, y` include both ends of
    the fitted ranges, and :math:`\sigma` is a standard deviation: GUDHI's convention.

    Args:
        births: Range of the births, lowest and highest node.
        persistences: Range of the persistences.
        sigma: Width of the Gaussians, in the unit of the lengths.
        scale: What images are divided by: the greatest pixel of the clouds it was fitted on.
        resolution: Number of nodes on each side.

    Raises:
        ValueError: If sigma or the scale is not positive.

    References:
        Do Topological Characteristics Help in Knowledge Distillation? (Kim et al., ICML 2024)
        https://proceedings.mlr.press/v235/kim24aj.html

    Examples:
        >>> from topkd.topology import rips
        >>> clouds = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> image = PersistenceImage.fit(rips(clouds))
        >>> pixels = image(rips(clouds))  # rows are persistence, flattened row by row
        >>> pixels.shape, round(pixels.max().item(), 6)
        (torch.Size([10, 400]), 1.0)
    """

    births: tuple[float, float]
    persistences: tuple[float, float]
    sigma: float
    scale: float = 1.0
    resolution: int = 20

    def __post_init__(self) -> None:
        _check_positive(self, "sigma", "scale")

    @property
    def size(self) -> int:
        """How many numbers describe one diagram."""
        return self.resolution**2

    @classmethod
    def fit(cls, diagrams: Diagrams, *, resolution: int = 20) -> PersistenceImage:
        """Chooses range, width and scale as the authors of TopKD do, from several diagrams.

        The width is the 0.2-quantile of the distances, above 1e-5, between the first 200 points.

        Args:
            diagrams: Of clouds that the teacher makes of training images, (clouds, bars, 2).
            resolution: Number of nodes on each side.

        Raises:
            ValueError: If all of the first 200 bars are equal, so that there is no width.
        """
        points = _birth_and_persistence(diagrams.bars.detach().double()).flatten(0, -2)
        points = points[points[:, 1] > 0]  # the authors' bars come from GUDHI, which drops the rest
        distances = torch.nn.functional.pdist(points[:200])
        distances = distances[distances > 1e-5]
        if len(distances) == 0:
            raise ValueError("the first 200 bars are equal: a persistence image needs a width")
        low, high = points.amin(0).tolist(), points.amax(0).tolist()
        image = cls(
            (low[0], high[0]), (low[1], high[1]), distances.quantile(0.2).item(), 1.0, resolution
        )
        return cls(**asdict(image) | {"scale": image(diagrams).max().item()})

    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes the images of diagrams, (clouds, resolution²)."""
        birth, persistence = _birth_and_persistence(diagrams.bars).unbind(-1)
        weight = 10 * persistence.tanh() + 10 * (100 * birth + 1).log()
        columns = self._gaussians(birth, self.births)
        rows = self._gaussians(persistence, self.persistences)
        pixels = torch.einsum("...k,...kr,...kc->...rc", weight, rows, columns)
        return pixels.flatten(-2) / (2 * math.pi * self.sigma**2 * self.scale)

    def _gaussians(self, values: Tensor, ends: tuple[float, float]) -> Tensor:
        nodes = torch.linspace(*ends, self.resolution, dtype=values.dtype, device=values.device)
        return (-0.5 * ((nodes - values[..., None]) / self.sigma).square()).exp()


@dataclass(frozen=True)
class PersistenceVector:
    r"""The H0 diagram as a smoothed histogram of its deaths, in units of their mean.

    .. math:: v_i = \frac{1}{s} \sum_k p_k
        \Big[\Phi\Big(\frac{u_{i+1} - p_k}{\sigma}\Big)
        - \Phi\Big(\frac{u_i - p_k}{\sigma}\Big)\Big],
        \qquad p_k = d_k \Big/ \frac{1}{n-1} \sum_j d_j

    with cells :math:`[u_i, u_{i+1}]` and the normal distribution function :math:`\Phi`. Each bar
    counts by its persistence, so that bars of length zero count nothing. The gradient passes
    through the mean. A cloud whose points coincide gives zeros.

    Args:
        persistences: Lowest and highest cell edge, in means of the deaths of a cloud.
        sigma: Width of the smoothing, in the same unit.
        scale: What vectors are divided by: the greatest entry of the clouds it was fitted on.
        resolution: Number of cells.

    Raises:
        ValueError: If sigma or the scale is not positive, or the range is empty.

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

    def __post_init__(self) -> None:
        _check_positive(self, "sigma", "scale")
        if not self.persistences[0] < self.persistences[1]:
            raise ValueError(
                f"persistences must be a range, low then high, got {self.persistences}"
            )

    @property
    def size(self) -> int:
        """How many numbers describe one diagram."""
        return self.resolution

    @classmethod
    def fit(cls, diagrams: Diagrams, *, resolution: int = 20) -> PersistenceVector:
        """Chooses range, width and scale from several diagrams.

        The width is one cell; the range reaches from 0 to the greatest death and three widths
        beyond, where a student that is spread more widely than its teacher still finds a gradient.

        Args:
            diagrams: Of clouds that the teacher makes of training images, (clouds, bars, 2).
            resolution: Number of cells.

        Raises:
            ValueError: If there is no bar, or only bars of length zero, or too few cells.
        """
        if resolution <= MARGIN:
            raise ValueError(f"resolution must be more than {MARGIN}, got {resolution}")
        relative = _relative(diagrams.deaths.detach().double())
        if not (relative > 0).any():
            raise ValueError("there is no bar of any length: a persistence vector needs a range")
        greatest = relative.max().item()
        cell = greatest / (resolution - MARGIN)
        vector = cls((0.0, resolution * cell), cell, 1.0, resolution)
        return cls(**asdict(vector) | {"scale": vector(diagrams).max().item()})

    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes the vectors of diagrams, (clouds, resolution)."""
        persistence = _relative(diagrams.deaths)
        edges = torch.linspace(
            *self.persistences,
            self.resolution + 1,
            dtype=persistence.dtype,
            device=persistence.device,
        )
        below = torch.special.ndtr((edges - persistence[..., None]) / self.sigma)
        return torch.einsum("...k,...ki->...i", persistence, below.diff(dim=-1)) / self.scale


Vectorisation = PersistenceImage | PersistenceVector
"""Anything that makes numbers of diagrams and can be stored."""

FORMS: Mapping[Form, type[Vectorisation]] = {"image": PersistenceImage, "vector": PersistenceVector}


def to_json(vectorisation: Vectorisation) -> dict[str, Any]:
    """Describes a fitted vectorisation, so that :func:`from_json` makes the same again."""
    form = next(form for form, kind in FORMS.items() if isinstance(vectorisation, kind))
    return {"form": form} | asdict(vectorisation)


def from_json(description: Mapping[str, Any]) -> Vectorisation:
    """Makes the vectorisation that :func:`to_json` described."""
    parameters: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description.items()
        if key != "form"
    }
    return FORMS[description["form"]](**parameters)


def _birth_and_persistence(bars: Tensor) -> Tensor:
    return torch.stack([bars[..., 0], (bars[..., 1] - bars[..., 0]).clamp(min=0)], dim=-1)


def _relative(deaths: Tensor) -> Tensor:
    """Divides the deaths of every cloud by their mean; of coincident points, leaves them 0."""
    mean = deaths.mean(-1, keepdim=True)
    return deaths / torch.where(mean > 0, mean, 1.0)


def _check_positive(vectorisation: Vectorisation, *names: str) -> None:
    for name in names:
        value = getattr(vectorisation, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive, got {value}")
