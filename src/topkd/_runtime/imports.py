"""Code of the user's own, imported by the name of its module."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def imported(module: str) -> ModuleType:
    """Imports a module, which may lie in the current folder.

    As with ``python -m``, the current folder comes first. Afterwards it comes last: what the code
    imports while it runs is still found, in processes of its own too, and no file in the folder is
    taken for a package that we import later.

    Raises:
        ImportError: If there is no such module, or it cannot be imported.
    """
    here = str(Path.cwd())
    importlib.invalidate_caches()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)
