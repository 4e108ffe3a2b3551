"""Compilation of kernels with an on-disk cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function that Numba compiles on first call; it releases the GIL.

    Compiled code is cached on disk. If no folder is writable, as in a container without a home
    directory, each process compiles again and logs one warning.

    Args:
        options: Options of ``numba.njit``.
    """

    def decorated(function: Callable[..., Any]) -> Any:
        kernel = njit(nogil=True, **options)(function)
        try:
            kernel._cache = _Cache(function)
        except RuntimeError:  # numba: no locator available
            _warn()
        return kernel

    return decorated


class _Cache(FunctionCache):
    """Numba's function cache; functions are recompiled if it cannot be read or written."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except OSError:
            _warn()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            _warn()


@cache
def _warn() -> None:
    logging.getLogger(__name__).warning(
        "topkd: compiled kernels cannot be cached, so each process compiles them again; "
        "set NUMBA_CACHE_DIR to a writable folder"
    )
