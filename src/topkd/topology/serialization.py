"""Vectorizations as data: described without remainder, read again, and part of a ``state_dict``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from topkd.topology.curves import BettiCurve, Curve, EntropyCurve, Landscape, Silhouette
from topkd.topology.images import PersistenceImage, PersistenceVector
from topkd.topology.rips import Diagrams

WARN_ABOVE = 0.1  # share of the mass that lies outside

Form = Literal["image", "vector"]
Vectorization = PersistenceImage | PersistenceVector | Curve
"""Anything that makes numbers of diagrams and can be stored."""

FORMS: Mapping[Form, type[PersistenceImage] | type[PersistenceVector]] = {
    "image": PersistenceImage,
    "vector": PersistenceVector,
}
"""What a recipe may ask for."""

VECTORIZATIONS: Mapping[str, type[Vectorization]] = {
    "image": PersistenceImage,
    "vector": PersistenceVector,
    "betti": BettiCurve,
    "landscape": Landscape,
    "silhouette": Silhouette,
    "entropy": EntropyCurve,
}
"""All that can be stored, by the name it is stored under."""


def to_json(vectorization: Vectorization) -> dict[str, Any]:
    """Describes a fitted vectorization, so that :func:`from_json` makes the same again."""
    kinds = {kind: form for form, kind in VECTORIZATIONS.items()}
    return {"form": kinds[type(vectorization)]} | asdict(vectorization)


def from_json(description: Mapping[str, Any]) -> Vectorization:
    """Makes the vectorization that :func:`to_json` described.

    Raises:
        ValueError: If the form is unknown, or its parameters are not these.
    """
    form = str(description.get("form"))
    if form not in VECTORIZATIONS:
        raise ValueError(f"form must be one of {', '.join(VECTORIZATIONS)}, got {form!r}")
    parameters: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description.items()
        if key != "form"
    }
    try:
        return VECTORIZATIONS[form](**parameters)
    except TypeError as error:
        raise ValueError(f"these are not the parameters of the form {form!r}: {error}") from error


def lost_mass(vectorization: Vectorization, diagrams: Diagrams) -> Tensor:
    """Computes the share of the mass of diagrams that lies outside the range of a vectorization.

    There a vectorization does not see bars, and gives them no gradient, but for those that are
    nearer to the range than some sigma. Of an image or vector, the mass is the weight of the bars,
    each within or without as a whole. Of a curve, it is their length, of which a part may lie
    within.

    Args:
        vectorization: Whose range it is.
        diagrams: Of one or several clouds.

    Returns:
        One number from 0 to 1, of all diagrams together; 0 if they have no mass.

    Examples:
        >>> from topkd.topology import rips
        >>> clouds = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(0))
        >>> image = PersistenceImage.fit(rips(clouds))
        >>> [round(lost_mass(image, rips(k * clouds)).item(), 2) for k in (1, 1.5, 3)]
        [0.0, 0.12, 0.97]
    """
    all_of_it, inside = (mass.sum() for mass in vectorization.masses(diagrams))
    return (1 - inside / all_of_it.where(all_of_it > 0, 1)).where(all_of_it > 0, 0).clamp(min=0)


class VectorizationLayer(nn.Module):
    """A vectorization as a module, so that its parameters are part of a ``state_dict``.

    They are stored as the JSON of :func:`to_json` in a tensor of bytes, which
    ``torch.load(weights_only=True)`` and safetensors read, too. Loading replaces the vectorization
    by the stored one, of whatever form. Nothing is learned.

    It warns, once, when more than a tenth of the mass of the diagrams that it sees lies outside the
    range (:func:`lost_mass`): at calls 1, 2, 4, 8 and so on, so that watching costs nothing in
    a loop, and never while compiling.

    Args:
        vectorization: What it computes.

    Examples:
        >>> from topkd.topology import rips
        >>> clouds = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(0))
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
            self._watch(diagrams)
        return self.vectorization(diagrams)

    @torch.no_grad()
    def _watch(self, diagrams: Diagrams) -> None:
        self._calls += 1
        if self._has_warned or self._calls & (self._calls - 1) != 0:
            return
        lost = lost_mass(self.vectorization, diagrams).item()
        if lost > WARN_ABOVE:
            self._has_warned = True
            warnings.warn(
                f"{lost:.0%} of the mass of these diagrams lies outside the range of "
                f"{type(self.vectorization).__name__}, where nothing is seen and no gradient is "
                "left; fit it on clouds of this scale, or in a unit",
                stacklevel=2,
            )

    def get_extra_state(self) -> Tensor:
        content = json.dumps(to_json(self.vectorization)).encode()
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.vectorization = from_json(json.loads(bytes(state.tolist())))

    def extra_repr(self) -> str:
        return repr(self.vectorization)
