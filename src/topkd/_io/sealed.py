"""Safetensors files with a hash of their tensors and metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

KEY = "topkd"
"""Metadata key of our files. It is the only one: safetensors does not keep the order of keys."""


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Writes tensors as safetensors; the metadata hold a description and a hash of both.

    Args:
        tensors: Name -> tensor.
        about: Description, made of JSON values.

    Examples:
        >>> content = pack({"a": torch.ones(2)}, {"is": "an example"})
        >>> unpack(content, "here")
        ({'a': tensor([1., 1.])}, {'is': 'an example'})
        >>> unpack(content.replace(b"example", b"exemple"), "here")
        Traceback (most recent call last):
        ValueError: here was altered: its sha256 does not match its content
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    description = json.loads(json.dumps(dict(about)))
    metadata = json.dumps({"about": description, "sha256": _seal(plain, description)})
    return save_safetensors(plain, {KEY: metadata})


def unpack(content: bytes, origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file written by :func:`pack`, or a plain safetensors file, which has no hash.

    Args:
        content: Content of the file.
        origin: Name of the file, for messages.

    Returns:
        The tensors and the description, which is empty for a plain safetensors file.

    Raises:
        ValueError: If the file is incomplete or was altered.
    """
    try:
        tensors = load_safetensors(content)
    except SafetensorError as error:
        raise ValueError(f"{origin} is not a complete safetensors file: {error}") from error
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    if KEY not in metadata:
        return tensors, {}
    try:
        sealed = json.loads(metadata[KEY])
        about, seal = sealed["about"], sealed["sha256"]
        intact = isinstance(about, dict) and seal == _seal(tensors, about)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{origin} was altered: its sha256 does not match its content")
    return tensors, about


def _seal(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
