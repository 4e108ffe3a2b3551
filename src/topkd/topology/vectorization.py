"""The interface of vectorizations and their registry.

A vectorization maps a persistence diagram to a vector of fixed size. It is a frozen dataclass that
derives from :class:`Vectorization`, sets a ``name`` and implements ``fit``. Its name can then be
used as ``form`` of the loss ``topkd``, and it can be stored; no other file has to change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from topkd.topology._validation import check_choice
from topkd.topology.rips import Diagrams
from topkd.topology.scaling import DiagramScale, TreeScale

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11

MARGIN = 3  # cells or grid steps beyond the range of the diagrams that were fitted

_REGISTERED: dict[str, type[Vectorization]] = {}


@dataclass(frozen=True)
class Vectorization(ABC):
    """Base class of vectorizations. A subclass that sets ``name`` is registered.

    Examples:
        >>> VECTORIZATIONS["landscape"].__name__
        'Landscape'
    """

    name: ClassVar[str]
    """Name in recipes and files."""
    default_scale: ClassVar[TreeScale] = "tree_mean"
    """Scale that losses use by default."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            if cls.name in _REGISTERED:
                raise ValueError(f"there is already a vectorization {cls.name!r}")
            _REGISTERED[cls.name] = cls

    @property
    @abstractmethod
    def scale(self) -> DiagramScale:
        """Scale of births and deaths."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Number of nodes or cells per axis."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Length of the vector."""

    @classmethod
    @abstractmethod
    def fit(cls, diagrams: Diagrams, *, scale: DiagramScale = "none") -> Self:
        """Chooses the parameters from training diagrams of one dimension.

        Raises:
            ValueError: If these diagrams do not determine the parameters.
        """

    @classmethod
    def fit_dimension(cls, diagrams: Diagrams, dimension: int, *, scale: DiagramScale) -> Self:
        """Fits the variant that losses use in a dimension; by default it is the same in all.

        Raises:
            ValueError: If these diagrams do not determine the parameters.
        """
        return cls.fit(diagrams, scale=scale)

    @abstractmethod
    def __call__(self, diagrams: Diagrams) -> Tensor:
        """Computes the vectors of diagrams, (clouds, size)."""

    @abstractmethod
    def masses(self, diagrams: Diagrams) -> tuple[Tensor, Tensor]:
        """Computes the mass of each bar, in total and within the range, both (clouds, bars)."""


VECTORIZATIONS: Mapping[str, type[Vectorization]] = MappingProxyType(_REGISTERED)
"""All vectorizations by name."""


def vectorization_type(name: str) -> type[Vectorization]:
    """Looks up a vectorization by name.

    Raises:
        ValueError: If there is none of that name.
    """
    check_choice("form", name, VECTORIZATIONS)
    return VECTORIZATIONS[name]


def detached(diagrams: Diagrams) -> Diagrams:
    """Detaches diagrams and converts them to float64, to fit parameters."""
    return replace(
        diagrams, births=diagrams.births.detach().double(), deaths=diagrams.deaths.detach().double()
    )
