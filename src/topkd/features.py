"""Batches, features and feature extraction with hooks, for any unmodified network."""

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
    """A batch of images with their labels and data set indices."""

    images: Tensor  # (n, 3, h, w), normalized
    target: Tensor  # (n,); for mixed images, the label with the largest weight
    index: Tensor  # (n,), indices into the data set
    soft: Tensor | None = None  # (n, classes), soft labels of mixed images; None without mixing

    def apply(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Applies ``function`` to every tensor."""
        soft = None if self.soft is None else function(self.soft)
        return Batch(function(self.images), function(self.target), function(self.index), soft)


@dataclass(frozen=True)
class Features:
    """Outputs of one network for one batch."""

    logits: Tensor  # (n, classes)
    embedding: Tensor  # (n, d), input of the classifier
    maps: list[Tensor] = field(default_factory=list)  # (n, c, h, w) each, shallow to deep
    preactivations: list[Tensor] = field(default_factory=list)  # the maps before their ReLU
    others: dict[str, Tensor] = field(default_factory=dict)  # tap -> features for single losses
    distilled: Tensor | None = None  # (n, classes), logits of a distillation head

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


INPUT = ":in"  # suffix of taps that read a module's input instead of its output


@dataclass
class _Tap:
    """A hook that records one tensor; unlike a closure, it can be deep-copied."""

    records: dict[str, tuple[Tensor, int] | None]
    name: str

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
        if self.name not in self.records:  # the network was called directly, not by the extractor
            return
        value = args[0] if self.name.endswith(INPUT) else output
        if not isinstance(value, Tensor):
            kind = _kind(value)
            raise ValueError(f"the tap {self.name!r} reads {kind} where a tensor is needed")
        self.records[self.name] = value, _version(value)


class FeatureExtractor(nn.Module):
    """Wraps a classifier; also returns its embedding and selected intermediate features.

    Features are recorded by forward hooks; the outputs of the network do not change. Its weights
    are made contiguous, and images are converted to the memory format that the processor computes
    correctly and fastest. A tap is the name of a module, whose output is recorded. With the suffix
    ``:in``, the input of the module is recorded instead, and the module no longer works in place. A
    network that returns a pair of logits has two heads; the second is the distillation head.

    Args:
        network: Any image classifier.
        maps: Taps of the feature maps, shallow to deep.
        head: Name of the classifier module; its input is the embedding.
        preactivations: Taps of the feature maps before their activation, shallow to deep.
        distilled: Tap of the logits of the distillation head, if there is one. It is recorded even
            if the network returns a single tensor.
        to_map: Converts a recorded tensor to a map (n, c, h, w), for networks that compute with
            tokens or keep the channels last.

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
        to_map: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        super().__init__()
        self.found = ""  # description of the taps for the user, if a trial run determined them
        self.memory_format = memory_format(network)
        # The images determine the format; channels-last weights would override it.
        self.network = network.to(memory_format=torch.contiguous_format)
        self.to_map = to_map
        self.maps, self.preactivations = tuple(maps), tuple(preactivations)
        self.others: tuple[str, ...] = ()
        self._records: dict[str, tuple[Tensor, int] | None] = {}
        self._embedding = head + INPUT
        self._distilled = () if distilled is None else (distilled,)
        for tap in self._taps:
            self._hook(tap)
        self._head = [_module(network, head)]  # in a list: already registered with the network

    def also(self, taps: Sequence[str]) -> None:
        """Adds taps, whose features :attr:`Features.others` will hold.

        Args:
            taps: Taps that single losses need.

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
        """Copies the network and attaches other taps to the copy.

        Args:
            maps: Taps of the feature maps of the copy.
            preactivations: Taps of the pre-activations of the copy.
            without: Names of modules that are replaced by the identity.

        Returns:
            The extractor of the copy; hooks and weights are not shared.

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
        return FeatureExtractor(network, maps, head, preactivations, to_map=self.to_map)

    @property
    def _taps(self) -> tuple[str, ...]:
        always = (*self.maps, *self.preactivations, self._embedding, *self._distilled)
        return tuple(dict.fromkeys((*always, *self.others)))

    def _hook(self, tap: str) -> None:
        module, hook = _module(self.network, tap.removesuffix(INPUT)), _Tap(self._records, tap)
        if not tap.endswith(INPUT):
            module.register_forward_hook(hook)
            return
        module.register_forward_pre_hook(hook)
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # would overwrite the recorded input

    def head(self, embedding: Tensor) -> Tensor:
        """Computes the logits of embeddings (n, d), without triggering hooks."""
        if isinstance(self.classifier, nn.Conv2d):  # 1x1, after global pooling
            return self.classifier.forward(embedding[:, :, None, None]).flatten(1)
        return self.classifier.forward(embedding)

    @property
    def classifier(self) -> nn.Module:
        """The module that computes logits from embeddings."""
        return self._head[0]

    def forward(self, images: Tensor) -> Features:
        self._records.update(dict.fromkeys(self._taps))
        try:
            logits, distilled = self._logits(images)
            maps = [self.to_map(self._read(tap)) for tap in self.maps]
            preactivations = [self.to_map(self._read(tap)) for tap in self.preactivations]
            embedding = self._read(self._embedding).flatten(1)
            others = {tap: self.to_map(self._read(tap)) for tap in self.others}
            for tap in self._distilled:
                distilled = self._read(tap)
        finally:
            self._records.clear()
        return Features(logits, embedding, maps, preactivations, others, distilled)

    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            output = self.network(formatted(images, self.memory_format))
        except AssertionError as error:  # transformers assert the image size they were built for
            size, name = " x ".join(map(str, images.shape[1:])), type(self.network).__name__
            raise ValueError(f"{name} does not accept images of {size}: {error}") from error
        heads = output if isinstance(output, tuple) else (output, None)
        if len(heads) != 2 or not isinstance(heads[0], Tensor):
            raise ValueError(
                f"{type(self.network).__name__} returns {_kind(output)}; a classifier must return "
                "logits, or the logits of two heads"
            )
        return heads

    def _read(self, tap: str) -> Tensor:
        record = self._records[tap]
        if record is None:
            raise ValueError(f"the network did not use the module {tap!r} that a tap names")
        tensor, version = record
        if _version(tensor) != version:
            raise ValueError(
                f"the tensor that the tap {tap!r} read was overwritten later by an in-place "
                "operation; tap the module that overwrites it instead"
            )
        return tensor


def _version(tensor: Tensor) -> int:
    """Counts the in-place changes of a tensor; always 0 where torch does not track them."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


def _kind(output: Any) -> str:
    if isinstance(output, tuple):
        return f"{len(output)} values ({', '.join(type(part).__name__ for part in output)})"
    return f"a {type(output).__name__}"


def _module(network: nn.Module, name: str) -> nn.Module:
    modules = dict(network.named_modules())
    if name not in modules:
        near = get_close_matches(name, modules, n=8, cutoff=0.5)
        suggested = near or [child for child, _ in network.named_children()]
        raise ValueError(
            f"{type(network).__name__} has no module {name!r}; it has {', '.join(suggested)}"
        )
    return modules[name]


class Teacher(nn.Module):
    """A frozen teacher: eval mode, no gradients, excluded from ``state_dict``.

    It ignores :meth:`train` and returns features without gradient. Images are converted from the
    normalization of the student's data to the teacher's and, if necessary, resized.

    Args:
        network: The trained network.
        mean: Channel means that normalized its training images.
        std: Channel standard deviations that normalized its training images. By default, images
            are taken as they are.
        seen_mean: Channel means that normalized the images passed to :meth:`forward`. Defaults to
            ``mean``.
        seen_std: Channel standard deviations of the same. Defaults to ``std``.
        size: Height and width of its training images in pixels. Other images are resized to it,
            bilinearly with antialiasing. By default, images are not resized.

    Examples:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
        >>> teacher = Teacher(FeatureExtractor(network, maps=[], head="1"), (0.5,) * 3, (0.25,) * 3)
        >>> features = teacher.train()(torch.zeros(2, 3, 2, 2))
        >>> features.logits.shape, features.logits.requires_grad, teacher.network.training
        (torch.Size([2, 10]), False, False)
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
        trained_mean, trained_std = torch.tensor(mean), torch.tensor(std)
        input_mean = trained_mean if seen_mean is None else torch.tensor(seen_mean)
        input_std = trained_std if seen_std is None else torch.tensor(seen_std)
        self._scale = (input_std / trained_std)[:, None, None]
        self._shift = ((input_mean - trained_mean) / trained_std)[:, None, None]
        self._is_identity = bool((self._scale == 1).all() and (self._shift == 0).all())
        self._size = size

    @property
    def network(self) -> FeatureExtractor:
        """The network, in eval mode and without gradients."""
        return self._network[0]

    def train(self, mode: bool = True) -> Teacher:
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        self.network._apply(fn, recurse)  # .to() and .double() must still reach the network
        self._scale, self._shift = fn(self._scale), fn(self._shift)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        if not self._is_identity:
            images = images * self._scale + self._shift
        if self._size is not None and images.shape[-2:] != (self._size, self._size):
            square = (self._size, self._size)
            images = F.interpolate(images, square, mode="bilinear", antialias=True)
        return self.network(images)
