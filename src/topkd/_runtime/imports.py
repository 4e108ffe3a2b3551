"""Import of user code by module name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def imported(module: str) -> ModuleType:
    """Imports a module, also from the current folder.

    As with ``python -m``, the current folder comes first in ``sys.path`` during the import.
    Afterwards it comes last: later imports of the user's code are still found, in subprocesses too,
    and no file in the folder shadows an installed package.

    Raises:
        ImportError: If the module does not exist or cannot be imported.
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
