"""Several processes that train one network, started by torchrun or accelerate launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # for what the first process does alone, such as training a RipsNet
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out")


def accelerator() -> Accelerator:
    """Joins the processes that were started together, on the device of this one.

    Raises:
        ValueError: If several processes were started and this one would train alone.
    """
    from accelerate import Accelerator  # takes a second, which who wants one loss need not wait
    from accelerate.utils import InitProcessGroupKwargs

    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    # Without a GPU, accelerate joins processes only if it is told to use the CPU.
    joined = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
    started = _started()
    if joined.num_processes < started:
        raise ValueError(
            f"WORLD_SIZE is {started}, but this process trains with {joined.num_processes - 1} "
            "others, and each would train a network of its own; start them with torchrun"
        )
    return joined


def count() -> int:
    """Counts the processes that train together."""
    return distributed.get_world_size() if _are_several() else 1


def rank() -> int:
    """Numbers this process among those that train together, from 0."""
    return distributed.get_rank() if _are_several() else 0


def by_first(work: Callable[[], T]) -> T:
    """Runs ``work`` in the first process alone and returns its result in every process.

    Only the first process needs the files that ``work`` reads. Where it raises an exception, every
    process raises it, and none waits for the others.

    Args:
        work: Returns what can be pickled.
    """
    if count() == 1:
        return work()
    outcome: list[tuple[T, None] | tuple[None, Exception] | None] = [None]
    if rank() == 0:
        try:
            outcome = [(work(), None)]
        except Exception as error:  # raised below, by every process
            outcome = [(None, error)]
    distributed.broadcast_object_list(outcome, src=0)
    assert outcome[0] is not None
    value, raised = outcome[0]
    if raised is not None:
        raise raised
    return value  # type: ignore[return-value]  # where nothing was raised, it is a T


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrites tensors by those of the first process."""
    if count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def of_all(value: T) -> list[T]:
    """Collects a value of every process, in the order of their ranks.

    Args:
        value: What can be pickled.
    """
    if count() == 1:
        return [value]
    values: list[T] = [value] * count()
    distributed.all_gather_object(values, value)
    return values


def merge(values: dict[str, str]) -> None:
    """Adds to a dictionary the entries that it has in the other processes."""
    for entries in of_all(values):
        values.update(entries)


def share(items: int) -> Tensor:
    """Lists the part of so many items that this process works on.

    Every process has equally many, so that the last one may repeat the last item.
    """
    each = -(-items // count())
    return torch.arange(rank() * each, (rank() + 1) * each).clamp(max=items - 1)


def joined(part: Tensor, items: int) -> Tensor:
    """Joins what the processes computed for their :func:`share` of so many items."""
    return part if count() == 1 else gather(part)[:items]


class _Sum(torch.autograd.Function):
    """The sum over processes; the gradient of a part is that of the sum, from all processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class _Gather(torch.autograd.Function):
    """Joins what all processes have; each gets back the gradient of its part from all of them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(count())]
        distributed.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient).chunk(count())[rank()]


def total(own: Tensor) -> Tensor:
    """Sums a tensor over the processes, with gradient."""
    summed: Tensor = _Sum.apply(own)
    return summed


def gather(own: Tensor) -> Tensor:
    """Joins tensors (n, ...) of the processes, equally large, along n, with gradient."""
    gathered: Tensor = _Gather.apply(own.contiguous())
    return gathered


def lost(error: Exception) -> bool:
    """Tests whether an error means that another of the processes has ended."""
    return _started() > 1 and any(sign in str(error) for sign in _LOST)


def _are_several() -> bool:
    """Tests whether processes train together, and joins them if they have not yet joined."""
    if not distributed.is_available():
        return False
    if not distributed.is_initialized() and _started() > 1:
        accelerator()
    return distributed.is_initialized()


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
