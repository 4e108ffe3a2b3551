"""Device, precision and compilation of networks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from topkd._runtime import processes, processor
from topkd._runtime.memory_format import BLOCK
from topkd.config.recipe import Recipe

LONG = 500_000  # training images from which compiling pays for itself


@dataclass(frozen=True)
class Runtime:
    """Device, precision and compilation of networks."""

    device: torch.device
    dtype: torch.dtype  # of the networks; losses are always float32
    compile: bool

    @classmethod
    def of(cls, recipe: Recipe, images: int) -> Runtime:
        """Chooses what the recipe leaves open.

        Args:
            recipe: May ask for a precision and for compiling.
            images: In the training set.

        Raises:
            ValueError: If several processes were started and do not find each other.
        """
        device = processes.accelerator().device
        dtype = getattr(torch, recipe.precision, None) or fastest_dtype(device)
        # Measured on CPUs: what compiling gains on a network it loses to the convolutions around.
        pays = device.type == "cuda" and images * recipe.epochs >= LONG
        compile = pays if recipe.compile == "auto" else recipe.compile
        return cls(device, dtype, compile)

    def autocast(self) -> AbstractContextManager[Any]:
        """Computes networks in :attr:`dtype` inside the ``with``."""
        half = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half)


def choices() -> dict[str, str]:
    """Describes what is chosen for this machine where a recipe leaves it open."""
    device = processes.accelerator().device
    return {
        "device": str(device),
        "precision": str(fastest_dtype(device)).removeprefix("torch."),
        "memory_format": "channels_last; contiguous_format for networks with a strided 1x1 "
        f"convolution of fewer than {BLOCK} input channels",
    }


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Chooses bfloat16 where a device has instructions for it, else float32."""
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = device.type == "cpu" and processor.computes_bfloat16()
    return torch.bfloat16 if gains else torch.float32
