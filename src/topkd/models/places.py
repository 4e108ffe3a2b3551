"""Places in a network, found by running it: the map that its classifier pools, inputs of ReLUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from topkd.features import INPUT, FeatureExtractor, Features, Teacher
from topkd.models.found import watched


class Place(NamedTuple):
    """A tap that reads a feature map, and the height and width of this map."""

    tap: str
    size: tuple[int, int]


def tolerance(dtype: torch.dtype) -> float:
    """Returns the relative error at which two ways to compute a tensor count as the same.

    This is half of the digits of the precision, 0.0003 in float32. Wrong places differ by some
    percent or more.
    """
    return torch.finfo(dtype).eps ** 0.5


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of two tensors, divided by the largest expected value."""
    found, expected = found.detach(), expected.detach()
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)


def logits_error(
    network: FeatureExtractor, embedding: Tensor, features: Features, *, centered: bool = True
) -> float:
    """Returns the relative error of the logits that a classifier computes from embeddings.

    Args:
        network: The network, whose classifier is used.
        embedding: Embeddings, (n, d).
        features: Features of the network for the same images, with the expected logits.
        centered: Whether a constant per image is ignored. It changes no prediction; networks that
            end in a log-softmax subtract one.

    Returns:
        The error; infinite if the classifier expects another number of dimensions.
    """
    try:
        with torch.no_grad():
            dtype = next(network.classifier.parameters(), embedding).dtype
            found = network.head(embedding.to(dtype)).to(features.logits.dtype)
    except RuntimeError:  # a classifier of several layers does not state its width
        return math.inf
    expected = features.logits
    if found.shape != expected.shape:
        return math.inf
    if centered:
        found, expected = (each - each.mean(1, keepdim=True) for each in (found, expected))
    return relative_error(found, expected)


def pooled_map(asked: FeatureExtractor | Teacher, images: Tensor) -> Place | None:
    """Finds the feature map whose averages over all positions are the input of the classifier.

    The network is run once on noise, and the averages of all inputs and outputs of its modules are
    compared with the embedding. Among several places, the last one of the largest size is used.

    Args:
        asked: The network, which is not changed.
        images: Images of the size to run, (n, 3, h, w); only their shape is used.

    Returns:
        The place, or None: no module reads or computes such a map, as in transformers with a class
        token and in networks that normalize the averages; or the classifier computes something
        else than the logits.

    Examples:
        >>> from topkd.models.registry import MODELS
        >>> pooled_map(MODELS["wrn_16_1"].build(10), torch.zeros(1, 3, 32, 32))
        Place(tap='avgpool:in', size=(8, 8))
    """
    averages: dict[str, tuple[Tensor, torch.Size]] = {}

    def see(tap: str, seen: Tensor) -> None:
        averages.pop(tap, None)  # a tap reads the last call
        averages[tap] = seen.mean((2, 3)), seen.shape[2:]

    network, features = _run(asked, images, see)
    embedding = features.embedding
    if not logits_error(network, embedding, features) <= tolerance(embedding.dtype):
        return None
    found = [
        Place(tap, (size[0], size[1]))
        for tap, (average, size) in averages.items()
        if average.shape == embedding.shape
        and relative_error(average, embedding) <= tolerance(embedding.dtype)
    ]
    # Of one position are the averages themselves, also normalized, unless all last maps are.
    least = min(2, features.maps[-1].shape[2:].numel()) if features.maps else 2
    found = [place for place in found if place.size[0] * place.size[1] >= least]
    largest = max((place.size[0] * place.size[1] for place in found), default=0)
    return next((p for p in reversed(found) if p.size[0] * p.size[1] == largest), None)


def precede_relu(
    asked: FeatureExtractor | Teacher, images: Tensor, read: Callable[[Features], Sequence[Tensor]]
) -> list[bool]:
    """Returns which features are followed by a ReLU.

    The network is run twice on noise. A ReLU follows if it is applied to the feature, or if the
    feature has negative values and any operation computes it with zeros in their place.

    Args:
        asked: The network, which is not changed.
        images: Images of the size to run, (n, 3, h, w); only their shape is used.
        read: Selects the features.

    Examples:
        >>> from topkd.models.registry import MODELS
        >>> network = MODELS["mobilenetv2"].build(10)  # no ReLU follows its blocks
        >>> precede_relu(network, torch.zeros(1, 3, 32, 32), lambda f: f.preactivations)
        [True, False, False, False, False]
    """
    before = list(read(_run(asked, images)[1]))
    with _Rectified(before) as computed:
        _run(asked, images)
    return computed.found


class _Rectified(TorchDispatchMode):
    """Watches all operations for ReLUs of given tensors."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()
        self.before, self.after = before, [tensor.clamp(min=0) for tensor in before]
        self.negative = [not _is_same(*both) for both in zip(before, self.after, strict=True)]
        self.found = [False] * len(before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        is_relu = func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
        left = [place for place, found in enumerate(self.found) if not found]
        for place in left if is_relu else ():
            self.found[place] = _is_same(args[0], self.before[place])
        output = func(*args, **(kwargs or {}))
        for place in left if isinstance(output, Tensor) else ():
            if self.negative[place]:
                self.found[place] |= _is_same(output, self.after[place])
        return output


def _is_same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal but for their last digits, in which two runs may differ."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    return relative_error(found, expected) <= tolerance(expected.dtype)


def _run(
    asked: FeatureExtractor | Teacher,
    images: Tensor,
    see: Callable[[str, Tensor], None] = lambda tap, seen: None,
) -> tuple[FeatureExtractor, Features]:
    """Runs a network in eval mode on noise and passes the maps of all modules to a function."""
    network = asked.network if isinstance(asked, Teacher) else asked
    names = {module: name for name, module in network.network.named_modules()}

    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        taps = {names[module]: output}
        if args and not getattr(module, "inplace", False):  # else the input is overwritten
            taps = {names[module] + INPUT: args[0], **taps}
        for tap, seen in taps.items():
            if isinstance(seen, Tensor) and (read := _as_map(network, seen)) is not None:
                see(tap, read)

    weight = next(network.parameters())
    noise = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    with watched(network.network, hook), torch.no_grad():
        network.network.eval()
        return network, asked(noise.to(weight.device, weight.dtype))


def _as_map(network: FeatureExtractor, seen: Tensor) -> Tensor | None:
    """Returns a tensor as a map (n, c, h, w); None if it is none."""
    try:
        read = network.to_map(seen)
    except ValueError:  # tokens that do not form a square
        return None
    return read if read.ndim == 4 and read.is_floating_point() and read.numel() else None
