"""Compilation of kernels, which are cached on disk where that is possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function that numba compiles when it is first called; it releases the GIL.

    The compiled code is cached on disk. Where no folder can be written, as in a container without
    a home, each process compiles it again, and one line in the log says so.

    Args:
        options: As of ``numba.njit``.
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
    """Numba's cache of a function; what cannot be read or written is compiled again."""

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
        "topkd: compiled kernels cannot be cached, so that each process compiles them again; "
        "set NUMBA_CACHE_DIR to a folder that can be written"
    )
