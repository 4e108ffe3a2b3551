"""Taps of torchvision and timm models: stages, feature maps and classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor, nn

from topkd.features import INPUT

_STAGES = {  # torchvision: the stem and four stages
    "ResNet": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "RegNet": ("stem", *(f"trunk_output.block{number}" for number in range(1, 5))),
    "DenseNet": ("features.relu0", *(f"features.denseblock{number}" for number in range(1, 5))),
    "ShuffleNetV2": ("conv1", "stage2", "stage3", "conv5"),
    "ConvNeXt": tuple(f"features.{number}" for number in (0, 1, 3, 5, 7)),
    "SwinTransformer": tuple(f"features.{number}" for number in (0, 1, 3, 5, 7)),
    "MaxVit": ("stem", *(f"blocks.{number}" for number in range(4))),
    "GoogLeNet": ("conv1", "conv3", "inception3b", "inception4e", "inception5b"),
    "Inception3": ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
}
_SEQUENCES = {  # torchvision: sequences without named stages
    "AlexNet": "features",
    "EfficientNet": "features",
    "MNASNet": "layers",
    "MobileNetV2": "features",
    "MobileNetV3": "features",
    "VGG": "features",
}
_RECTIFIED = ("AlexNet", "RegNet", "ResNet", "VGG")  # stages end with a ReLU
_CHANNELS_LAST = (
    "SwinTransformer",
    "VisionTransformerSAM",
    "VOLO",
)  # besides models with output_fmt


def taps_of(network: nn.Module) -> dict[str, Any]:
    """Returns the taps of a network, as arguments of :class:`topkd.features.FeatureExtractor`.

    Maps are the outputs of the stem and of the stages, after the last layer of each resolution. A
    transformer of constant resolution is divided into four stages with the same number of blocks.
    If all stages end in a ReLU, its inputs are the pre-activations.

    Args:
        network: A network of torchvision or timm, of a subclass, or any other.

    Returns:
        The known taps. For a network of another family, this is only ``to_map``; like timm's
        networks, it may define ``num_prefix_tokens`` and ``output_fmt = "NHWC"``.

    Examples:
        >>> from torchvision.models import mobilenet_v2
        >>> taps = taps_of(mobilenet_v2())
        >>> taps["maps"], taps["head"]
        (('features.1', 'features.3', 'features.6', 'features.13', 'features.18'), 'classifier.1')
    """
    origins = {kind.__name__: kind.__module__.split(".")[0] for kind in type(network).__mro__}
    families = [name for name, origin in origins.items() if origin in ("torchvision", "timm")]
    if not families:
        return {"to_map": _to_map(network, ())}
    is_timm = origins[families[0]] == "timm"
    taps = _of_timm(network, families) if is_timm else _of_torchvision(network, families)
    if "maps" in taps and not {*families}.isdisjoint(_RECTIFIED):
        taps["preactivations"] = _before_relu(network, taps["maps"])
    return taps | {"to_map": _to_map(network, families)}


def fold_tokens(tokens: Tensor, prefix: int) -> Tensor:
    """Reshapes the tokens of an image to a feature map; other tensors are returned unchanged.

    Args:
        tokens: (n, prefix + side², d), the tokens of the image row by row.
        prefix: Number of tokens before these (class, registers), unless they are added later.

    Returns:
        The map (n, d, side, side).

    Raises:
        ValueError: If the number of image tokens is not a square.

    Examples:
        >>> import torch
        >>> fold_tokens(torch.zeros(2, 1 + 14 * 14, 192), prefix=1).shape
        torch.Size([2, 192, 14, 14])
    """
    if tokens.ndim != 3:
        return tokens
    for others in (prefix, 0):
        side = isqrt(max(0, tokens.shape[1] - others))
        if side and others + side**2 == tokens.shape[1]:
            return tokens[:, others:].mT.unflatten(2, (side, side))
    raise ValueError(
        f"{tokens.shape[1]} tokens, of which {prefix} come before the image's, do not form a "
        "square map; set the network's num_prefix_tokens"
    )


def channels_first(seen: Tensor) -> Tensor:
    """Permutes a map (n, h, w, c) to (n, c, h, w); other tensors are returned unchanged."""
    return seen.permute(0, 3, 1, 2) if seen.ndim == 4 else seen


def _keeps_channels_last(network: nn.Module, families: Sequence[str]) -> bool:
    layout = getattr(network, "output_fmt", None)
    return layout == "NHWC" or (layout is None and not {*families}.isdisjoint(_CHANNELS_LAST))


def _to_map(network: nn.Module, families: Sequence[str]) -> Callable[[Tensor], Tensor]:
    if _keeps_channels_last(network, families):
        return channels_first
    of_torchvision = "VisionTransformer" in families and hasattr(network, "conv_proj")
    prefix = 1 if of_torchvision else getattr(network, "num_prefix_tokens", 0)
    return partial(fold_tokens, prefix=prefix)


def _of_torchvision(network: nn.Module, families: Sequence[str]) -> dict[str, Any]:
    taps: dict[str, Any] = {}
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if linear:
        taps["head"] = linear[-1]
    for family in families:
        if family in _STAGES:
            taps["maps"] = _STAGES[family]
        elif family in _SEQUENCES:
            taps["maps"] = _ends_of_stages(network, _SEQUENCES[family])
        elif family == "VisionTransformer":
            layers = network.get_submodule("encoder.layers").named_children()
            blocks = [f"encoder.layers.{name}" for name, _ in layers]
            taps["maps"] = ("conv_proj", *_quarters(blocks))
    return taps


def _of_timm(network: nn.Module, families: Sequence[str]) -> dict[str, Any]:
    known = dict(network.named_modules())
    taps: dict[str, Any] = {}
    config: Any = getattr(network, "pretrained_cfg", {})
    heads = config.get("classifier") or ()
    heads = [heads] if isinstance(heads, str) else list(heads)
    distils = len(heads) == 2 and "head_dist" in heads[1]
    if heads and heads[0] in known and (len(heads) == 1 or distils):
        taps["head"] = heads[0]
    if distils and heads[1] in known:
        taps["distilled"] = heads[1]
    info: Any = getattr(network, "feature_info", ())
    features = [dict(feature) for feature in info]
    maps = [feature["module"] for feature in features]
    if maps and all(name and name in known for name in maps):
        stages = _stages_of_timm(known, maps, features)
        # In a patch embedding, the convolution has no prefix tokens.
        stems = ["patch_embed.proj", "stem.proj", "stem", "patch_embed"]
        if _keeps_channels_last(network, families):
            stems = ["patch_embed", "stem"]
        stem = [name for name in stems if name in known and features[0]["reduction"] >= 4]
        taps["maps"] = (*stem[:1], *stages)
    return taps


def _stages_of_timm(
    known: dict[str, nn.Module], maps: list[str], features: list[dict[str, Any]]
) -> list[str]:
    """Selects stages from the modules in timm's ``feature_info``."""
    maps = [name for name in maps if not isinstance(known[name], nn.MaxPool2d)]
    if len(maps) > 4 and len({feature["reduction"] for feature in features}) == 1:
        maps = _quarters(maps)
    if "conv_head" in known and "bn2" in known:  # EfficientNet pools the output of its head
        maps[-1] = "bn2"
    return maps


def _quarters(blocks: Sequence[str]) -> list[str]:
    """Selects the last block of each of four equally long stages."""
    return [blocks[len(blocks) * number // 4 - 1] for number in range(1, 5)]


def _ends_of_stages(network: nn.Module, sequence: str) -> tuple[str, ...]:
    """Finds the layers before each reduction of the resolution, and the last layer."""
    layers = dict(network.get_submodule(sequence).named_children())
    names = list(layers)
    pools = [name for name, layer in layers.items() if isinstance(layer, nn.MaxPool2d)]
    # If pools reduce the resolution, the last layer is a pool, preceded by the last map.
    shrinking = pools or [name for name, layer in layers.items() if _strides(layer)]
    ends = [names[names.index(name) - 1] for name in shrinking if name != names[0]]
    return tuple(f"{sequence}.{name}" for name in (ends if pools else [*ends, names[-1]]))


def _strides(layer: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in layer.modules())


def _before_relu(network: nn.Module, maps: Sequence[str]) -> tuple[str, ...]:
    """Returns taps of the inputs of the last ReLU of every stage; empty unless all have one."""
    found = []
    for tap in maps:
        inside = network.get_submodule(tap).named_modules(prefix=tap)
        found.append([name for name, module in inside if isinstance(module, nn.ReLU)])
    return tuple(names[-1] + INPUT for names in found) if all(found) else ()
