"""Taps of networks of unknown families, detected by running the network once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from topkd.features import INPUT

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # containers of blocks
_SIZES = (32, 224, 64, 8, 28, 96, 128, 256)  # tried if no size is given, the most common first


class _Seen(NamedTuple):
    """A module, its output, and the version of the output."""

    module: nn.Module
    output: Tensor
    version: int


@dataclass
class _Trace:
    """Outputs of modules, in the order of their last call."""

    names: dict[nn.Module, str]
    seen: dict[str, _Seen] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self.names[module]
        self.seen.pop(name, None)  # a tap reads the last call
        is_read = bool(args) and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if is_read and output.is_floating_point():
            self.seen[name] = _Seen(module, output, output._version)


def taps_by_running(network: nn.Module, shape: Sequence[int] | None) -> dict[str, Any]:
    """Detects the classifier and the feature maps of a network by running it on noise.

    The classifier is the linear layer or 1x1 convolution whose output equals the logits, before a
    log-softmax if there is one; without either, any layer with weights. The maps are the last
    outputs of each resolution, shallow to deep, of complete blocks. Pools are excluded, as are maps
    of one pixel and maps smaller than later ones, such as squeeze-and-excitation gates.

    Args:
        network: The network, which is unchanged except for lazily shaped layers.
        shape: Channels, height and width of its images. Defaults to the first common size that it
            accepts, with three channels.

    Returns:
        ``head``, ``maps`` and ``preactivations``, arguments of
        :class:`topkd.features.FeatureExtractor`, without ``head`` if no layer matches, and
        without pre-activations unless every map ends in a ReLU module.

    Raises:
        RuntimeError: If the network does not accept images of this size.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...                         nn.Flatten(), nn.Linear(4, 10))
        >>> taps_by_running(network, (3, 8, 8))
        {'maps': ('1',), 'preactivations': ('1:in',), 'head': '4'}
    """
    shapes = [(3, side, side) for side in _SIZES] if shape is None else [shape]
    for number, tried in enumerate(shapes, start=1):
        try:
            trace, logits = _run(network, tried)
        except (RuntimeError, AssertionError):  # torch's, and those of transformers
            if number == len(shapes):
                raise
        else:
            break
    head = _head(trace, logits)
    maps = _maps(trace, head)
    taps = {"maps": maps, "preactivations": _before_relu(trace, maps)}
    return taps if head is None else taps | {"head": head}


def _run(network: nn.Module, shape: Sequence[int]) -> tuple[_Trace, Any]:
    trace = _Trace({module: name for name, module in network.named_modules() if name})
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    weight = next(iter(network.parameters()), noise)
    with watched(network, trace), torch.no_grad():
        logits = network.eval()(noise.to(weight.device, weight.dtype))
    return trace, logits[0] if isinstance(logits, tuple) else logits


@contextmanager
def watched(network: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Hooks all modules temporarily; restores random state and training modes.

    Args:
        network: The network.
        hook: A forward hook, registered with every module but the network itself.
    """
    training = {module: module.training for module in network.modules()}
    hooks = [module.register_forward_hook(hook) for name, module in network.named_modules() if name]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for handle in hooks:
            handle.remove()
        for module, was in training.items():
            module.training = was


def _head(trace: _Trace, logits: Any) -> str | None:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        return None
    heads = {
        name: module
        for name, (module, output, _) in trace.seen.items()
        if _equals_logits(output, logits) and [*module.parameters(recurse=False)]
    }
    linear = [name for name, module in heads.items() if _is_linear(module)]
    return next(reversed(linear or list(heads)), None)


def _equals_logits(output: Tensor, logits: Tensor) -> bool:
    """Returns whether an output equals the logits up to a constant."""
    if output.shape[0] != logits.shape[0] or output[0].numel() != logits.shape[1]:
        return False
    found = output.flatten(1)
    return torch.allclose(found - found.mean(1, True), logits - logits.mean(1, True), atol=1e-5)


def _is_linear(module: nn.Module) -> bool:
    is_pointwise = isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}
    return is_pointwise or isinstance(module, nn.Linear)


def _maps(trace: _Trace, head: str | None) -> tuple[str, ...]:
    """Lists the last output of the outermost blocks of each resolution, shallow to deep.

    Inside a block, outputs before its stride still have the previous resolution.
    """
    blocks = {name for module, name in trace.names.items() if not isinstance(module, _LISTS)}
    pooled = [output for module, output, _ in trace.seen.values() if _is_pool(module)]
    maps: dict[int, tuple[int, str]] = {}  # pixels -> nesting depth and name
    largest = 2
    for name, (_, output, version) in reversed(trace.seen.items()):
        pixels = output.shape[2:].numel() if output.ndim == 4 else 0
        is_kept = output._version == version and not any(output is other for other in pooled)
        if pixels < largest or not is_kept or name == head:
            continue
        largest = pixels
        parts = name.split(".")
        depth = sum(".".join(parts[:end]) in blocks for end in range(1, len(parts)))
        if pixels not in maps or depth < maps[pixels][0]:
            maps[pixels] = depth, name
    return tuple(name for _, name in reversed(maps.values()))


def _before_relu(trace: _Trace, maps: Sequence[str]) -> tuple[str, ...]:
    """Returns taps of the inputs of the ReLUs that end the maps; empty unless all maps have one."""
    relus = [
        (name, output)
        for name, (module, output, _) in trace.seen.items()
        if isinstance(module, nn.ReLU)
    ]
    ends = [[name for name, output in relus if output is trace.seen[tap].output] for tap in maps]
    return tuple(names[-1] + INPUT for names in ends) if all(ends) else ()


def _is_pool(module: nn.Module) -> bool:
    return type(module).__module__ == nn.MaxPool2d.__module__
