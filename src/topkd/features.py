"""What networks are shown and what they make of it, for any network and without changing it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topkd._runtime.memory_format import formatted, memory_format


@dataclass(frozen=True)
class Batch:
    """What a network is shown."""

    images: Tensor  # (n, 3, h, w), normalized
    target: Tensor  # (n,); of mixed images, the label that counts most
    index: Tensor  # (n,), which samples of the data set these are
    soft: Tensor | None = None  # (n, classes), the labels of mixed images; None if none is mixed

    def apply(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Applies ``function`` to every tensor."""
        soft = None if self.soft is None else function(self.soft)
        return Batch(function(self.images), function(self.target), function(self.index), soft)


@dataclass(frozen=True)
class Features:
    """What one network made of one batch."""

    logits: Tensor  # (n, classes)
    embedding: Tensor  # (n, d), what the classifier reads
    maps: list[Tensor] = field(default_factory=list)  # (n, c, h, w) each, shallow to deep
    preactivations: list[Tensor] = field(default_factory=list)  # the maps before their ReLU
    others: dict[str, Tensor] = field(default_factory=dict)  # by tap, what single losses ask for
    distilled: Tensor | None = None  # (n, classes), of a head of its own that learns from teachers

    def apply(self, function: Callable[[Tensor], Tensor]) -> Features:
        """Applies ``function`` to every tensor."""
        return Features(
            function(self.logits),
            function(self.embedding),
            [function(m) for m in self.maps],
            [function(m) for m in self.preactivations],
            {tap: function(tensor) for tap, tensor in self.others.items()},
            None if self.distilled is None else function(self.distilled),
        )

    def tensors(self) -> list[Tensor]:
        """Lists every tensor, in a fixed order."""
        return [
            self.logits,
            self.embedding,
            *self.maps,
            *self.preactivations,
            *self.others.values(),
            *([] if self.distilled is None else [self.distilled]),
        ]


INPUT = ":in"  # ends the name of a tap that reads what a module is given


@dataclass
class _Tap:
    """A hook that keeps one tensor where it is waited for; unlike a closure, it can be copied."""

    seen: dict[str, tuple[Tensor, int] | None]
    name: str

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
        if self.name not in self.seen:  # somebody else asked the network
            return
        kept = args[0] if self.name.endswith(INPUT) else output
        if not isinstance(kept, Tensor):
            raise ValueError(f"the tap {self.name!r} reads {_kind(kept)} where a tensor is needed")
        self.seen[self.name] = kept, _version(kept)


class FeatureExtractor(nn.Module):
    """A classifier that also returns what chosen modules computed on the way.

    The network is read through hooks and computes what it did. Its weights are made contiguous, and
    its images are laid out in the format that the processor computes correctly and fastest. A
    tap is the name of a module, whose output is read; with ``:in`` after the name, its input is,
    which the module then overwrites no longer. A network that answers with a pair has two heads:
    its logits come first, those of the head that learns from teachers second.

    Args:
        network: Any classifier, wherever it comes from.
        maps: Taps of the feature maps, shallow to deep.
        head: Name of the classifier module; its input is the embedding.
        preactivations: Taps of the feature maps before their activation, shallow to deep.
        distilled: Tap of the logits of a head that learns from teachers, where there is one; it is
            also read where the network answers with one tensor.
        to_map: Makes a map (n, c, h, w) of what a tap read, for networks that compute with tokens
            or keep the channels last.

    Raises:
        ValueError: If the network has no module of one of these names.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                         nn.Linear(4, 10))
        >>> features = FeatureExtractor(network, maps=["0"], head="3")(torch.zeros(2, 3, 8, 8))
        >>> features.embedding.shape, features.maps[0].shape
        (torch.Size([2, 4]), torch.Size([2, 4, 6, 6]))
    """

    def __init__(
        self,
        network: nn.Module,
        maps: Sequence[str],
        head: str,
        preactivations: Sequence[str] = (),
        distilled: str | None = None,
        to_map: Callable[[Tensor], Tensor] = lambda seen: seen,
    ) -> None:
        super().__init__()
        self.found = ""  # where it is read, for the user, if that is known from a trial alone
        self.memory_format = memory_format(network)
        # Its images decide, and weights that are channels-last would overrule them.
        self.network = network.to(memory_format=torch.contiguous_format)
        self._to_map = to_map
        self.maps, self.preactivations = tuple(maps), tuple(preactivations)
        self.others: tuple[str, ...] = ()
        self._seen: dict[str, tuple[Tensor, int] | None] = {}
        self._embedding = head + INPUT
        self._distilled = () if distilled is None else (distilled,)
        for tap in self._taps:
            self._hook(tap)
        self._head = [_module(network, head)]  # in a list: it is a part of the network already

    def also(self, taps: Sequence[str]) -> None:
        """Adds taps that single losses ask for, which :attr:`Features.others` will hold.

        Raises:
            ValueError: If the network has no module of one of these names.
        """
        for tap in dict.fromkeys(taps):
            if tap not in self._taps:
                self._hook(tap)
        self.others = tuple(dict.fromkeys((*self.others, *taps)))

    def retapped(
        self, maps: Sequence[str], preactivations: Sequence[str], *, without: Sequence[str] = ()
    ) -> FeatureExtractor:
        """Copies the network to read it elsewhere.

        Args:
            maps: Taps of the copy.
            preactivations: Taps of the copy.
            without: Names of modules that do nothing in it.

        Raises:
            ValueError: If the network has no module of one of these names.
        """
        network = copy.deepcopy(self.network)
        for module in network.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, _Tap)]:
                    del hooks[key]
        for name in without:
            network.set_submodule(name, nn.Identity())
        head = self._embedding.removesuffix(INPUT)
        return FeatureExtractor(network, maps, head, preactivations, to_map=self._to_map)

    @property
    def _taps(self) -> tuple[str, ...]:
        own = (*self.maps, *self.preactivations, self._embedding, *self._distilled)
        return tuple(dict.fromkeys((*own, *self.others)))

    def _hook(self, tap: str) -> None:
        module, hook = _module(self.network, tap.removesuffix(INPUT)), _Tap(self._seen, tap)
        if not tap.endswith(INPUT):
            module.register_forward_hook(hook)
            return
        module.register_forward_pre_hook(hook)
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # else it overwrites what is read

    def head(self, embedding: Tensor) -> Tensor:
        """Computes the logits of embeddings (n, d) without being noticed by the taps."""
        if isinstance(self.classifier, nn.Conv2d):  # of 1x1, on what was pooled
            return self.classifier.forward(embedding[:, :, None, None]).flatten(1)
        return self.classifier.forward(embedding)

    @property
    def classifier(self) -> nn.Module:
        """The module that makes logits of embeddings."""
        return self._head[0]

    def forward(self, images: Tensor) -> Features:
        self._seen.update(dict.fromkeys(self._taps))
        try:
            logits, distilled = self._answer(images)
            maps = [self._to_map(self._read(tap)) for tap in self.maps]
            preactivations = [self._to_map(self._read(tap)) for tap in self.preactivations]
            embedding = self._read(self._embedding).flatten(1)
            others = {tap: self._to_map(self._read(tap)) for tap in self.others}
            for tap in self._distilled:
                distilled = self._read(tap)
        finally:
            self._seen.clear()
        return Features(logits, embedding, maps, preactivations, others, distilled)

    def _answer(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            answer = self.network(formatted(images, self.memory_format))
        except AssertionError as error:  # so say transformers that are built for another size
            shown, name = " x ".join(map(str, images.shape[1:])), type(self.network).__name__
            raise ValueError(f"{name} refuses images of {shown}: {error}") from error
        heads = answer if isinstance(answer, tuple) else (answer, None)
        if len(heads) != 2 or not isinstance(heads[0], Tensor):
            raise ValueError(
                f"{type(self.network).__name__} answers with {_kind(answer)}; a classifier answers "
                "with logits, or with those of two heads"
            )
        return heads

    def _read(self, tap: str) -> Tensor:
        seen = self._seen[tap]
        if seen is None:
            raise ValueError(f"the network did not use the module {tap!r} that a tap names")
        tensor, version = seen
        if _version(tensor) != version:
            raise ValueError(
                f"what the tap {tap!r} read was overwritten later by an in-place operation; "
                "tap the module that does it instead"
            )
        return tensor


def _version(tensor: Tensor) -> int:
    """How often a tensor was overwritten; always 0 where torch does not count."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


def _kind(answer: Any) -> str:
    if isinstance(answer, tuple):
        return f"{len(answer)} values ({', '.join(type(part).__name__ for part in answer)})"
    return f"a {type(answer).__name__}"


def _module(network: nn.Module, name: str) -> nn.Module:
    modules = dict(network.named_modules())
    if name not in modules:
        near = get_close_matches(name, modules, n=8, cutoff=0.5)
        some = near or [child for child, _ in network.named_children()]
        raise ValueError(
            f"{type(network).__name__} has no module {name!r}; it has {', '.join(some)}"
        )
    return modules[name]


class Teacher(nn.Module):
    """A network that only answers: never trained, never in the graph, never in a checkpoint.

    It stays in eval mode whatever is asked of it, and its answers carry no gradient.

    Args:
        network: The trained network.
        mean: Mean of the images it was trained on, a channel each, as used to normalize them.
            Together with ``std``, it defaults to taking images as they are.
        std: Their standard deviation.
        seen_mean: Mean with which the images that it will be shown were normalized; the same
            as ``mean`` if not given.
        seen_std: Their standard deviation.
        size: Pixels on a side of the images that it was trained on; those that it will be shown
            are scaled to it, bilinearly and without aliasing. As they are if not given.
    """

    def __init__(
        self,
        network: FeatureExtractor,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        seen_mean: Sequence[float] | None = None,
        seen_std: Sequence[float] | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self._network = [network.eval().requires_grad_(False)]  # in a list: not a submodule
        self.mean, self.std = tuple(mean), tuple(std)
        own_mean, own_std = torch.tensor(mean), torch.tensor(std)
        mean_seen = own_mean if seen_mean is None else torch.tensor(seen_mean)
        std_seen = own_std if seen_std is None else torch.tensor(seen_std)
        self._scale = (std_seen / own_std)[:, None, None]
        self._shift = ((mean_seen - own_mean) / own_std)[:, None, None]
        self._same = bool((self._scale == 1).all() and (self._shift == 0).all())
        self._size = size

    @property
    def network(self) -> FeatureExtractor:
        """The network itself, in eval mode and without gradients."""
        return self._network[0]

    def train(self, mode: bool = True) -> Teacher:
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        self.network._apply(fn, recurse)  # so that .to() and .double() still reach it
        self._scale, self._shift = fn(self._scale), fn(self._shift)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        if not self._same:
            images = images * self._scale + self._shift
        if self._size is not None and images.shape[-2:] != (self._size, self._size):
            square = (self._size, self._size)
            images = F.interpolate(images, square, mode="bilinear", antialias=True)
        return self.network(images)
