"""Files of ``torch.save``, read without running any code in them."""

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

# What published checkpoints hold beside tensors: an accuracy as a NumPy number, and the options of
# the command line, whose class keeps what it is given as attributes and runs nothing.
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
    """An archive that would become larger than its file."""


def read(file: IO[bytes], origin: str) -> Any:
    """Reads what ``torch.save`` wrote, as far as it is tensors and plain values.

    It takes no more memory than the size of the file suggests.

    Args:
        file: Open for reading, at its beginning.
        origin: Its name, for the messages.

    Raises:
        ValueError: If it holds code, is compressed, or is not whole.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            plain = _uncompressed(file, origin)
            return torch.load(plain, map_location="cpu", weights_only=True)
    except _CompressedError:
        raise
    except Exception as error:  # whatever a file of unknown origin provokes in the unpickler
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise ValueError(
                f"{origin} is refused: to load it would run {code[1]}; "
                "only tensors and plain values are loaded"
            ) from error
        raise ValueError(f"{origin} is not a whole checkpoint of PyTorch") from error


def _uncompressed(file: IO[bytes], origin: str) -> IO[bytes]:
    """Copies an archive, and refuses one whose members are compressed, which PyTorch's never are.

    Two readers can find different sizes in one file. Of the copy torch finds those checked here.
    """
    is_zip = file.read(4) == b"PK\x03\x04"  # by which torch tells, too
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not is_zip:
        return file
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as plain:
        members = archive.infolist()
        whole = sum(member.file_size for member in members)
        if whole > size or any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise _CompressedError(
                f"{origin} is refused: it is a compressed archive, of {size:,} bytes, which hold "
                f"{whole:,} by its own account; torch.save writes it without compression"
            )
        for member in members:
            plain.writestr(member.filename, archive.read(member))
    copy.seek(0)
    return copy
