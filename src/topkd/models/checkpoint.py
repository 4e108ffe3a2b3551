"""Weights files of topkd and of other projects, read without running code in them."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from topkd._io import files, pickles, sealed
from topkd.config.validation import Section, validated

LARGEST_SIDE = 16_384  # pixels
WEIGHTS = "student.safetensors"
"""The weights file of a run."""
EXPORTED = "model.safetensors"
"""The weights file of an export."""
_ACCURACIES = (  # keys in checkpoints of other projects
    *("accuracy", "best_accuracy", "test_accuracy", "best_acc", "best_acc1", "acc", "test_acc"),
    *("best_prec1", "prec1", "top1", "best_top1"),
)
_NOTED = (*_ACCURACIES, "n_averaged", "epoch")  # scalars that may be stored as tensors
_AVERAGED = {
    "ema",
    "swa",
    "avg",
    "averaged",
    "average",
    "shadow",
}  # words in names of averaged weights
_SHOWN = 3  # number of names in a message

Which = Literal["plain", "ema"]
"""Weights to load from a file with both: as trained, or averaged over training."""


class Named(Section):
    """A section with a name and arbitrary other keys."""

    model_config = ConfigDict(extra="allow")

    name: str


class About(Section):
    """Schema of the metadata of a weights file; other keys are allowed."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    classes: tuple[str, ...] = ()
    size: Annotated[int, Field(gt=0, le=LARGEST_SIDE)] = 1
    mean: tuple[float, float, float] = (0, 0, 0)
    std: tuple[float, float, float] = (1, 1, 1)
    data: Named | None = None
    taps: dict[Literal["maps", "head", "preactivations"], str | tuple[str, ...]] = {}
    reused: dict[str, Any] | None = None


def save_weights(path: Path, network: nn.Module, about: Mapping[str, Any]) -> None:
    """Saves the weights of a network and their metadata as sealed safetensors."""
    files.write(path, sealed.pack(network.state_dict(), about))


def weights_file(target: Path) -> Path:
    """Returns the weights file of a run or an export, or the given file.

    Raises:
        FileNotFoundError: If there is none; the message lists the runs below a folder.
    """
    path = target / WEIGHTS if target.is_dir() else target
    if path.is_file():
        return path
    if not target.is_dir():
        raise FileNotFoundError(f"there is no run or file {target}")
    if (target / EXPORTED).is_file():
        return target / EXPORTED
    runs = sorted(str(found.parent) for found in target.rglob(WEIGHTS))
    more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    hint = f"; there are {', '.join(runs[:4])}{more}" if runs else ""
    raise FileNotFoundError(f"there is no run {target}: {path} is missing{hint}")


def read_about(path: Path) -> dict[str, Any]:
    """Reads the metadata of a file written by :func:`save_weights`; empty for other files.

    Raises:
        ValueError: If a safetensors file is incomplete or was altered, or its metadata do not match
            :class:`About`.
    """
    if path.suffix != ".safetensors":
        return {}
    about = sealed.unpack(path.read_bytes(), str(path))[1]
    validated(About, about, f"{path}: metadata")
    return about


def load_weights(path: Path) -> dict[str, Tensor]:
    """Loads every tensor in a weights file without running code in it.

    Safetensors are supported, and pickles that contain only tensors and plain values. The name of a
    tensor in nested mappings consists of all keys that lead to it, joined by dots. The key of a
    state dict in a checkpoint is thus a prefix like those of wrappers, which :func:`fill` finds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it contains no tensors or contains code, or was altered.
    """
    if path.suffix == ".safetensors":
        return sealed.unpack(path.read_bytes(), str(path))[0]
    tree = _read_pickle(path)
    weights = _tensors(tree) if isinstance(tree, Mapping) else {}
    if not isinstance(tree, Mapping) or (tree and not weights):
        found = _some(map(str, tree)) if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        raise ValueError(f"{path} contains no named weights; it contains {found}")
    return weights


def read_accuracy(path: Path) -> float | None:
    """Reads the accuracy recorded in a checkpoint, in percent; None if there is none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it contains code.
    """
    tree = None if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(tree, Mapping):
        return None
    noted = next((tree[name] for name in _ACCURACIES if name in tree), None)
    if isinstance(noted, Tensor) and noted.numel() == 1:
        noted = noted.item()
    if not isinstance(noted, int | float | np.number) or not math.isfinite(noted):
        return None
    accuracy = float(noted)
    return 100 * accuracy if accuracy <= 1 else accuracy


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return pickles.read(file, str(path))


def _tensors(tree: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Names tensors by their key paths; each mapping is visited once, since files may be cyclic."""
    found: dict[str, Tensor] = {}
    mappings, met = [("", tree)], {id(tree)}
    for prefix, mapping in mappings:
        for key, value in mapping.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{key}"] = value
            elif isinstance(value, Mapping) and id(value) not in met:
                met.add(id(value))
                mappings.append((f"{prefix}{key}.", value))
    return found


def fill(
    network: nn.Module, weights: Mapping[str, Tensor], origin: str, which: Which = "plain"
) -> str:
    """Loads weights into a network.

    They are loaded from the prefix under which all names of the network are present: that of a
    container, a wrapper, or a student stored with its teacher.

    Args:
        network: A network of the same architecture.
        weights: As :func:`load_weights` returns them; batch counters may be missing.
        origin: Origin of the weights, for messages.
        which: The weights to load if there are plain and averaged ones.

    Returns:
        A note for the user if plain and averaged weights fit; otherwise empty.

    Raises:
        ValueError: If names or shapes differ, several weights fit, none of the requested kind fits,
            or a weight is NaN or infinite. The message lists the first differences.
    """
    own = network.state_dict()
    prefix, note = _chosen(own, weights, origin, which)
    found = _under(prefix, own, weights)
    parameters = dict(network.named_parameters())
    for name, tensor in ((name, found[name]) for name in own if name in found):
        # Buffers may be infinite, as the masks of some transformers are.
        lost = ~tensor.isfinite() if name in parameters else tensor.isnan()
        if lost.any():
            raise ValueError(
                f"{origin}: {prefix}{name} contains NaN or infinity; the file is damaged, or its "
                "training diverged"
            )
    network.load_state_dict(found, strict=False)
    return note


def _chosen(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str, which: Which
) -> tuple[str, str]:
    """Selects the prefix of the weights to load; returns a note if both kinds fit."""
    fitting = [p for p in _prefixes(own, weights) if not _differences(own, weights, p)]
    if not fitting:
        raise ValueError(_misfit(own, weights, origin))
    # A checkpoint of a distillation may contain student and teacher; the student is loaded.
    fitting = [p for p in fitting if "teacher" not in _words(p)] or fitting
    kinds: dict[Which, list[str]] = {"plain": [], "ema": []}
    for prefix in fitting:
        kind: Which = "ema" if _is_averaged(prefix, weights) else "plain"
        kinds[kind].append(prefix)
    # Averaged weights are the default in a file without others.
    wanted = kinds[which] or (kinds["ema"] if which == "plain" else [])
    if not wanted:
        raise ValueError(
            f"{origin} has no averaged weights of this network (ema), only plain ones under "
            f"{_quoted(kinds['plain'])}"
        )
    if any(not _same(own, weights, wanted[0], other) for other in wanted[1:]):
        raise ValueError(
            f"{origin} has several weights that fit this network, under {_quoted(wanted)}; "
            "give a file with one of them"
        )
    if not kinds["plain"] or not kinds["ema"]:
        return wanted[0], ""
    other: Which = "plain" if which == "ema" else "ema"
    return wanted[0], (
        f"{which} weights, under {_quoted(wanted[:1])}; the file also has {other} ones, under "
        f"{_quoted(kinds[other][:1])}"
    )


def _prefixes(own: Mapping[str, Tensor], weights: Iterable[str]) -> list[str]:
    """Lists the prefixes under which most names of a network are found."""
    if all(map(_is_count, own)):
        return [""]
    found: Counter[str] = Counter()
    for name in weights:
        starts = (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        for start in starts:
            if name[start:] in own and not _is_count(name):
                found[name[:start]] += 1
    most = max(found.values(), default=0)
    return [prefix for prefix, count in found.items() if count == most]


def _under(
    prefix: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Selects the weights under a prefix, without scalars and other complete networks."""
    longer = [
        other
        for other in _prefixes(own, weights)
        if other != prefix
        and other.startswith(prefix)
        and all(
            _shape(weights.get(other + name)) == _shape(own[name])
            for name in own
            if not _is_count(name)
        )
    ]
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
        and not name.startswith(tuple(longer))
        and (name.removeprefix(prefix) in own or name.removeprefix(prefix) not in _NOTED)
    }


def _differences(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], prefix: str
) -> list[str]:
    found = _under(prefix, own, weights)
    return [
        f"{name}: {_shape(found.get(name))} in the file, {_shape(own.get(name))} in the network"
        for name in sorted(own.keys() | found.keys())
        if _shape(found.get(name)) != _shape(own.get(name)) and not _is_count(name)
    ]


def _misfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str) -> str:
    """Describes how weights differ from a network, for the best matching prefix."""
    prefixes = _prefixes(own, weights)
    if not prefixes:
        return (
            f"{origin} does not fit this network: none of its names are in the file, "
            f"which has {_some(weights)}; the network has {_some(own)}"
        )
    best = min(prefixes, key=lambda prefix: len(_differences(own, weights, prefix)))
    wrong = _differences(own, weights, best)
    lines = [*wrong[:_SHOWN], *([f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else [])]
    unknown = [name for name in _under(best, own, weights) if name not in own]
    if unknown and wrong[_SHOWN:]:
        lines.append(f"names in the file that the network does not have: {_some(unknown)}")
    where = f" with its weights under {best!r}" if best else ""
    return "\n  ".join((f"{origin} does not fit this network{where}:", *lines))


def _is_averaged(prefix: str, weights: Mapping[str, Tensor]) -> bool:
    counted = f"{prefix.removesuffix('module.')}n_averaged"  # as torch's AveragedModel does
    return not _AVERAGED.isdisjoint(_words(prefix)) or counted in weights


def _words(prefix: str) -> set[str]:
    return set(re.split(r"[._\W]+", prefix.lower()))


def _same(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], prefix: str, other: str
) -> bool:
    return all(
        torch.equal(weights[prefix + name], weights[other + name])
        for name in own
        if not _is_count(name)
    )


def _is_count(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _quoted(prefixes: Iterable[str]) -> str:
    """Quotes prefixes for a message."""
    return ", ".join(
        repr(prefix.removesuffix(".")) if prefix else "no prefix" for prefix in prefixes
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more or "nothing"


def hash_of(network: nn.Module) -> str:
    """Computes a hash of the weights of a network."""
    content = io.BytesIO()
    for name, tensor in sorted(network.state_dict().items()):
        content.write(name.encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        content.write(data.view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return files.sha256(content.getvalue())


def object_hash(network: nn.Module) -> str:
    """Computes a hash of the weights, the modules and the taps of a network without a name.

    Networks with the same weights may differ in modules without weights, such as activations.
    """
    read = (*("taps", "maps", "preactivations"), *("_embedding", "_distilled"))
    taps = [vars(network).get(name) for name in read]
    structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr((network, taps)))  # addresses vary
    tensors = (*network.parameters(), *network.buffers())
    weights = "" if any(map(is_lazy, tensors)) else hash_of(network)
    return files.sha256(f"{weights} {structure}".encode())


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
