"""Imports by module name: user code and optional packages."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


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


def optional(package: str, extra: str) -> Any:
    """Imports a package that an extra of this one installs.

    Args:
        package: Name of the package.
        extra: Name of the extra.

    Raises:
        ImportError: If it is not installed; the message gives the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this needs {package}: pip install 'topkd[{extra}]'") from error
