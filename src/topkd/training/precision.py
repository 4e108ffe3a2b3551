"""Device, precision and compilation of networks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topkd._io.progress import Progress
from topkd._runtime import processes, processor
from topkd._runtime.memory_format import BLOCK, memory_format
from topkd.config.recipe import Recipe
from topkd.features import Features

LONG = 500_000  # number of training images above which compilation saves time


@dataclass(frozen=True)
class Runtime:
    """Device, precision and compilation of networks."""

    device: torch.device
    dtype: torch.dtype  # autocast dtype of the networks; losses are always float32
    compile: bool

    @classmethod
    def of(cls, recipe: Recipe, images: int) -> Runtime:
        """Resolves the ``auto`` settings of a recipe.

        Args:
            recipe: Recipe with settings for precision and compilation.
            images: Number of training images.

        Raises:
            ValueError: If several processes were started but do not form one group.
        """
        device = processes.accelerator().device
        dtype = getattr(torch, recipe.precision, None) or fastest_dtype(device)
        # On CPUs, compilation showed no net speedup: fused operations gain what convolutions lose.
        pays = device.type == "cuda" and images * recipe.epochs >= LONG
        compile = pays if recipe.compile == "auto" else recipe.compile
        return cls(device, dtype, compile)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns an autocast context with :attr:`dtype`."""
        half = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half)


def choices() -> dict[str, str]:
    """Describes the values that ``auto`` settings take on this machine."""
    device = processes.accelerator().device
    return {
        "device": str(device),
        "precision": str(fastest_dtype(device)).removeprefix("torch."),
        "memory_format": "channels_last; contiguous_format for networks with a strided 1x1 "
        f"convolution of fewer than {BLOCK} input channels",
    }


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 if the device has instructions for it, else float32."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == "cpu" and processor.computes_bfloat16()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def compiled(
    network: nn.Module, runtime: Runtime, progress: Progress
) -> Callable[[Tensor], Features]:
    """Compiles a network, if the run compiles; falls back to eager mode with a message."""
    if not runtime.compile:
        return network
    # By default, Inductor converts convolutions to channels-last.
    contiguous = memory_format(network) is torch.contiguous_format
    run = torch.compile(network, options={"layout_optimization": False} if contiguous else None)

    def first_try(images: Tensor) -> Features:
        nonlocal run
        try:
            return run(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            progress.say(f"compilation failed, continuing uncompiled: {reason}")
            run = network
            return network(images)

    return first_try
