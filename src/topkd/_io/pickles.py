"""Safe loading of ``torch.save`` files: no code in them is run."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch

# Harmless objects in published checkpoints: an accuracy as a NumPy scalar, and command-line options
# as argparse.Namespace, which only stores attributes.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    argparse.Namespace,
]


class _CompressedError(ValueError):
    """Raised for a compressed archive, which could expand far beyond the size of its file."""


def read(file: IO[bytes], origin: str) -> Any:
    """Reads tensors and plain values from a ``torch.save`` file.

    Compressed archives are rejected, so memory use is bounded by the size of the file.

    Args:
        file: File opened for reading, at its start.
        origin: Name of the file, for messages.

    Raises:
        ValueError: If the file contains code, is compressed, or is incomplete.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            plain = _uncompressed(file, origin)
            return torch.load(plain, map_location="cpu", weights_only=True)
    except _CompressedError:
        raise
    except Exception as error:  # an untrusted file can cause any error in the unpickler
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise ValueError(
                f"{origin} is refused: loading it would run {code[1]}; "
                "only tensors and plain values are loaded"
            ) from error
        raise ValueError(f"{origin} is not a complete PyTorch checkpoint") from error


def _uncompressed(file: IO[bytes], origin: str) -> IO[bytes]:
    """Copies an archive; rejects one with compressed members, which PyTorch never writes.

    Two zip readers can find different sizes in the same file. In the copy, torch finds the sizes
    that were checked here.
    """
    is_zip = file.read(4) == b"PK\x03\x04"  # torch uses the same test
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not is_zip:
        return file
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as plain:
        members = archive.infolist()
        declared = sum(member.file_size for member in members)
        if declared > size or any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise _CompressedError(
                f"{origin} is refused: it is compressed, and its {size:,} bytes expand to "
                f"{declared:,}; torch.save does not compress"
            )
        for member in members:
            plain.writestr(member.filename, archive.read(member))
    copy.seek(0)
    return copy
