"""Serialization of vectorizations: to JSON and in a ``state_dict``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from topkd.topology.rips import Diagrams
from topkd.topology.vectorization import Vectorization, vectorization_type

WARN_ABOVE = 0.1  # share of mass outside the range


def to_json(vectorization: Vectorization) -> dict[str, Any]:
    """Serializes a vectorization to a dictionary that :func:`from_json` reads."""
    return {"form": vectorization.name} | asdict(vectorization)


def from_json(description: Mapping[str, Any]) -> Vectorization:
    """Creates a vectorization from the output of :func:`to_json`.

    Raises:
        ValueError: If the form is unknown, or its parameters are invalid.
    """
    kind = vectorization_type(str(description.get("form")))
    parameters: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description.items()
        if key != "form"
    }
    try:
        return kind(**parameters)
    except TypeError as error:
        raise ValueError(f"invalid parameters of the form {kind.name!r}: {error}") from error


def lost_mass(vectorization: Vectorization, diagrams: Diagrams) -> Tensor:
    """Computes the share of the mass of diagrams outside the range of a vectorization.

    Bars outside the range have no effect and no gradient, unless they are within a few sigmas of
    it. For images and vectors, the mass is the weight of the bars, each of which is inside or
    outside. For curves, it is the persistence of the bars, which may be partly inside.

    Args:
        vectorization: A fitted vectorization.
        diagrams: Diagrams of one or several clouds.

    Returns:
        The share over all diagrams, from 0 to 1; 0 if they have no mass.

    Examples:
        >>> from topkd.topology import rips
        >>> clouds = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> from topkd.topology import PersistenceImage
        >>> image = PersistenceImage.fit(rips(clouds))
        >>> [round(lost_mass(image, rips(k * clouds)).item(), 2) for k in (1, 1.5, 3)]
        [0.0, 0.12, 0.97]
    """
    total, inside = (mass.sum() for mass in vectorization.masses(diagrams))
    return (1 - inside / total.where(total > 0, 1)).where(total > 0, 0).clamp(min=0)


class VectorizationLayer(nn.Module):
    """A vectorization as a module, whose parameters are part of the ``state_dict``.

    Parameters are stored as the JSON of :func:`to_json` in a byte tensor, which
    ``torch.load(weights_only=True)`` and safetensors can load. Loading replaces the vectorization
    by the stored one, which may have another form. There are no trainable parameters.

    The module warns once if more than 10 % of the mass of its input is outside the range, see
    :func:`lost_mass`. It checks calls 1, 2, 4, 8 and so on, which has no measurable cost in a
    training loop, and skips the check while compiling.

    Args:
        vectorization: A fitted vectorization.

    Examples:
        >>> from topkd.topology import rips
        >>> clouds = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> from topkd.topology import PersistenceVector
        >>> layer = VectorizationLayer(PersistenceVector.fit(rips(clouds)))
        >>> again = VectorizationLayer(PersistenceVector((0.0, 1.0), sigma=1.0))
        >>> again.load_state_dict(layer.state_dict())
        <All keys matched successfully>
        >>> again.vectorization == layer.vectorization
        True
    """

    def __init__(self, vectorization: Vectorization) -> None:
        super().__init__()
        self.vectorization = vectorization
        self._calls, self._has_warned = 0, False

    def forward(self, diagrams: Diagrams) -> Tensor:
        if not torch.compiler.is_compiling():
            self._check_range(diagrams)
        return self.vectorization(diagrams)

    @torch.no_grad()
    def _check_range(self, diagrams: Diagrams) -> None:
        self._calls += 1
        if self._has_warned or self._calls & (self._calls - 1) != 0:
            return
        lost = lost_mass(self.vectorization, diagrams).item()
        if lost > WARN_ABOVE:
            self._has_warned = True
            warnings.warn(
                f"{lost:.0%} of the mass of these diagrams is outside the range of "
                f"{type(self.vectorization).__name__}, where there is no gradient; "
                "fit it on clouds of this size, or set a scale",
                stacklevel=2,
            )

    def get_extra_state(self) -> Tensor:
        content = json.dumps(to_json(self.vectorization)).encode()
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.vectorization = from_json(json.loads(bytes(state.tolist())))

    def extra_repr(self) -> str:
        return repr(self.vectorization)
