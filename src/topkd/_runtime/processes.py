"""Distributed training with processes started by ``torchrun`` or ``accelerate launch``."""

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
PATIENCE = timedelta(hours=6)  # time that rank 0 may work alone, e.g. to train a RipsNet
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out")


def accelerator() -> Accelerator:
    """Initializes distributed training and returns the Accelerator of this process.

    Raises:
        ValueError: If several processes were started but do not form one group.
    """
    from accelerate import Accelerator  # slow import, not needed to use a loss
    from accelerate.utils import InitProcessGroupKwargs

    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    # Without a GPU, accelerate joins processes only with cpu=True.
    joined = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
    started = _started()
    if joined.num_processes < started:
        raise ValueError(
            f"WORLD_SIZE is {started}, but this process trains with {joined.num_processes - 1} "
            "others, so each would train a separate network; start them with torchrun"
        )
    return joined


def count() -> int:
    """Returns the number of processes that train together."""
    return distributed.get_world_size() if _are_several() else 1


def rank() -> int:
    """Returns the rank of this process, from 0."""
    return distributed.get_rank() if _are_several() else 0


def by_first(work: Callable[[], T]) -> T:
    """Runs ``work`` in rank 0 only and returns its result in every process.

    Only rank 0 needs the files that ``work`` reads. If ``work`` raises an exception, every process
    raises it, and none waits for the others.

    Args:
        work: Function whose result can be pickled.
    """
    if count() == 1:
        return work()
    outcome: list[tuple[T, None] | tuple[None, Exception] | None] = [None]
    if rank() == 0:
        try:
            outcome = [(work(), None)]
        except Exception as error:  # raised below in every process
            outcome = [(None, error)]
    distributed.broadcast_object_list(outcome, src=0)
    assert outcome[0] is not None
    value, raised = outcome[0]
    if raised is not None:
        raise raised
    return value  # type: ignore[return-value]  # without an exception, it is a T


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Broadcasts tensors from rank 0, in place."""
    if count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def of_all(value: T) -> list[T]:
    """Gathers a value from every process, ordered by rank.

    Args:
        value: An object that can be pickled.
    """
    if count() == 1:
        return [value]
    values: list[T] = [value] * count()
    distributed.all_gather_object(values, value)
    return values


def merge(values: dict[str, str]) -> None:
    """Adds the entries of the same dictionary in other processes, in place."""
    for entries in of_all(values):
        values.update(entries)


def share(items: int) -> Tensor:
    """Returns the indices of the items that this process works on.

    Every process gets the same number, so the last one may repeat the last item.
    """
    each = -(-items // count())
    return torch.arange(rank() * each, (rank() + 1) * each).clamp(max=items - 1)


def joined(part: Tensor, items: int) -> Tensor:
    """Concatenates the results of all processes for their :func:`share` of the items."""
    return part if count() == 1 else gather(part)[:items]


# torch.distributed.nn.functional has the same two, deprecated since torch 2.14.


class _Sum(torch.autograd.Function):
    """Sums over processes; the gradient is summed over processes as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class _Gather(torch.autograd.Function):
    """Concatenates over processes; the gradient of each part is summed over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(count())]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient).chunk(count())[rank()]


def total(tensor: Tensor) -> Tensor:
    """Sums a tensor over the processes, with gradient."""
    summed: Tensor = _Sum.apply(tensor)
    return summed


def gather(tensor: Tensor) -> Tensor:
    """Concatenates tensors (n, ...) of equal shape over processes along n, with gradient."""
    gathered: Tensor = _Gather.apply(tensor.contiguous())
    return gathered


def lost(error: Exception) -> bool:
    """Tests whether an error means that another process has ended."""
    return _started() > 1 and any(sign in str(error) for sign in _LOST)


def _are_several() -> bool:
    """Tests for several processes; initializes the process group if necessary."""
    if not distributed.is_available():
        return False
    if not distributed.is_initialized() and _started() > 1:
        accelerator()
    return distributed.is_initialized()


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
