"""Where and in which numbers networks are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from topkd.recipe import Recipe

LONG = 500_000  # training images from which compiling pays for itself


@dataclass(frozen=True)
class Device:
    """Where and in which numbers networks are computed."""

    device: torch.device
    dtype: torch.dtype  # of the networks; losses are always float32
    compile: bool

    @classmethod
    def of(cls, recipe: Recipe, images: int) -> Device:
        """Chooses what the recipe leaves open.

        Args:
            recipe: May ask for a precision and for compiling.
            images: In the training set.
        """
        device = Accelerator().device
        precision = recipe.precision
        if precision == "auto":
            precision = "bfloat16" if _gains_from_bfloat16(device) else "float32"
        # Measured on CPUs: what compiling gains on a network it loses to the convolutions around.
        pays = device.type == "cuda" and images * recipe.epochs >= LONG
        compile = pays if recipe.compile == "auto" else recipe.compile
        return cls(device, getattr(torch, precision), compile)

    def autocast(self) -> AbstractContextManager[Any]:
        """Computes networks in :attr:`dtype` inside the ``with``."""
        half = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half)


def _gains_from_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    return False
