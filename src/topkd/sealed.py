"""Safetensors files with a hash of their tensors and metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

_SEAL = "sha256"


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Writes tensors and metadata as safetensors, with a hash of both in the metadata.

    Examples:
        >>> import torch
        >>> content = pack({"a": torch.ones(2)}, {"is": "an example"})
        >>> unpack(content, "here", key="is")
        ({'a': tensor([1., 1.])}, {'is': 'an example'})
        >>> unpack(content.replace(b"example", b"exemple"), "here", key="is")
        Traceback (most recent call last):
        ValueError: here was altered: its sha256 does not match its content
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return save_safetensors(plain, {**metadata, _SEAL: _seal(plain, metadata)})


def unpack(content: bytes, origin: str, *, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what :func:`pack` wrote, or safetensors of others, which have no hash.

    Args:
        content: Of the file.
        origin: Its name, for the messages.
        key: A key of the metadata that only files with a hash have.

    Raises:
        ValueError: If it is not whole, or was altered.
    """
    try:
        tensors = load_safetensors(content)
    except SafetensorError as error:
        raise ValueError(f"{origin} is not a whole safetensors file: {error}") from error
    size = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    seal = metadata.pop(_SEAL, None)
    if (seal is not None or key in metadata) and seal != _seal(tensors, metadata):
        raise ValueError(f"{origin} was altered: its sha256 does not match its content")
    return tensors, metadata


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
