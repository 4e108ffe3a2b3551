"""Allocator settings for training on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_GREATEST_MMAP_THRESHOLD = 32 << 20  # that glibc takes on 64 bits


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, in large pages, for the next training step.

    Every step allocates and frees the same activations. By default glibc returns them to the
    kernel, which then hands out and clears new pages, thousands a step. No number that is computed
    changes. The settings hold for the whole process, so that a program calls this, not a library,
    before it imports torch. Without glibc, nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own, read when it is loaded
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_MMAP_THRESHOLD, _GREATEST_MMAP_THRESHOLD)
