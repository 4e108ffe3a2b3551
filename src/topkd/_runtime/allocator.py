"""Allocator settings for training on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt
_GREATEST_MMAP_THRESHOLD = 32 << 20  # limit of glibc on 64 bits


def keep_freed_memory() -> None:
    """Keeps freed memory in the process, in huge pages, for the next training step.

    Every step allocates and frees the same activations. By default glibc returns them to the
    kernel, which then has to clear thousands of new pages per step. Numerical results are the same.
    The settings apply to the complete process, so a program should call this before it imports
    torch; a library should not. Without glibc, this function does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch when it is imported
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_MMAP_THRESHOLD, _GREATEST_MMAP_THRESHOLD)
