"""Knowledge distillation for PyTorch with topological losses.

* :func:`distill` trains students with a teacher in one call; :class:`Study` reads the results.
* :class:`Distiller` computes distillation losses in any training loop.
* :func:`load` loads a trained student.
* :mod:`~topkd.losses`, :mod:`~topkd.models`, :mod:`~topkd.data` and :mod:`~topkd.topology` hold the
  parts; :class:`Recipe` is the schema of recipes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topkd import data, losses, models, topology
    from topkd.config.recipe import Recipe
    from topkd.evaluation.loading import load
    from topkd.studies.pipeline import distill
    from topkd.studies.study import Study
    from topkd.training.distiller import Distiller

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "Recipe",
    "Study",
    "data",
    "distill",
    "load",
    "losses",
    "models",
    "topology",
]

# Imported at first use: `import topkd` loads neither torch nor anything else that is slow.
_PLACES = {
    "Distiller": "topkd.training.distiller",
    "Recipe": "topkd.config.recipe",
    "Study": "topkd.studies.study",
    "distill": "topkd.studies.pipeline",
    "load": "topkd.evaluation.loading",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name in __all__:
        return importlib.import_module(f"topkd.{name}")
    raise AttributeError(f"module 'topkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
