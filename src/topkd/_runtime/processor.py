"""Instruction set that oneDNN uses on this processor."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Ascending; oneDNN's name -> the CPU flag that torch reports for it.
_SETS = {
    "SSE41": "sse4_1",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx_vnni",
    "AVX2_VNNI_2": "avx_ne_convert",
    "AVX512_CORE": "avx512_bw",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_fp16",
    "AVX512_CORE_AMX": "amx_bf16",
    "AVX512_CORE_AMX_FP16": "amx_fp16",
}
_ALIASES = {
    "AVX10_1_512": "AVX512_CORE_FP16",
    "AVX10_1_512_AMX": "AVX512_CORE_AMX",
    "AVX10_1_512_AMX_FP16": "AVX512_CORE_AMX_FP16",
}
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the first takes precedence


def instruction_set() -> str:
    """Returns the highest instruction set that oneDNN uses on this machine.

    It is the highest one of the processor, or a lower one if the environment variable
    ``ONEDNN_MAX_CPU_ISA`` limits oneDNN.

    Returns:
        The name in oneDNN, e.g. ``AVX2``; the architecture if it is not x86.

    References:
        CPU dispatcher control
        https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
    """
    available = _available()
    if not available:
        return platform.machine()
    limit = next((os.environ[name] for name in _LIMITS if name in os.environ), "DEFAULT").upper()
    limit = _ALIASES.get(limit, limit)
    names = list(_SETS)
    highest = names.index(limit) if limit in names else len(names)
    within = [name for name in available if names.index(name) <= highest]
    return within[-1] if within else names[0]


def computes_bfloat16() -> bool:
    """Tests whether the processor has bfloat16 instructions that oneDNN uses."""
    names, used = list(_SETS), instruction_set()
    return used in names and names.index(used) >= names.index("AVX512_CORE_BF16")


def onednn_version() -> str:
    """Returns the version of oneDNN that torch was built with; ``none`` without it."""
    found = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return found[1] if found else "none"


def _available() -> list[str]:
    """Lists the instruction sets of this processor, ascending; empty if it is not x86."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch reports only the widest vectors
        known = {"AVX2": "AVX2", "AVX512": "AVX512_CORE"}
        widest = known.get(torch.backends.cpu.get_cpu_capability())
        return [] if widest is None else [widest]
    flags = torch.cpu.get_capabilities()
    return [name for name, flag in _SETS.items() if flags.get(flag)]


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Sets the number of CPU threads of PyTorch in a ``with`` block; None changes nothing.

    Examples:
        >>> before = torch.get_num_threads()
        >>> with cpu_threads(1):
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
