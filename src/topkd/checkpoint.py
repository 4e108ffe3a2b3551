"""Weights of networks, ours and those of others, read without running any code in a file."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from topkd import files, sealed

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
_WRAPPERS = ("model", "state_dict", "student", "net")  # keys under which others keep the weights
_ACCURACIES = ("accuracy", "best_acc", "best_acc1", "acc", "top1", "test_acc")  # of it, elsewhere
WEIGHTS = "student.safetensors"
"""The file of a run that holds its weights."""
_PREFIXES = ("module.", "student.", "_orig_mod.")


def save_weights(path: Path, network: nn.Module, about: Mapping[str, Any]) -> None:
    """Saves the weights of a network with what is needed to use them, as sealed safetensors."""
    files.write(path, sealed.pack(network.state_dict(), about))


def weights_file(target: Path) -> Path:
    """Finds the weights of a run, or of a file itself.

    Raises:
        FileNotFoundError: If there are none; the message lists the runs in a folder of runs.
    """
    path = target / WEIGHTS if target.is_dir() else target
    if path.is_file():
        return path
    if not target.is_dir():
        raise FileNotFoundError(f"there is no run or file {target}")
    runs = sorted(str(found.parent) for found in target.rglob(WEIGHTS))
    more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    hint = f"; there are {', '.join(runs[:4])}{more}" if runs else ""
    raise FileNotFoundError(f"there is no run {target}: {path} is missing{hint}")


def read_about(path: Path) -> dict[str, Any]:
    """Reads the description in a file that :func:`save_weights` wrote; empty for others' files.

    Raises:
        ValueError: If the file is of safetensors and is not whole, or was altered.
    """
    return sealed.unpack(path.read_bytes(), str(path))[1] if path.suffix == ".safetensors" else {}


def load_weights(path: Path) -> dict[str, Tensor]:
    """Loads the weights in a file of ours or of others, without running any code in it.

    Understood are safetensors, and pickles that hold nothing but tensors and plain values, bare or
    under ``model``, ``state_dict``, ``student`` or ``net``; prefixes that wrappers leave are taken
    off. Of a file that holds a student and its teacher, as mdistiller writes them, the student is
    loaded.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no weights, or code, or was altered.
    """
    if path.suffix == ".safetensors":
        return _without_prefixes(sealed.unpack(path.read_bytes(), str(path))[0])
    return _weights(_read_pickle(path), path)


def read_accuracy(path: Path) -> float | None:
    """Reads the accuracy, in percent, that others note in a checkpoint; None if there is none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds code.
    """
    tree = None if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(tree, Mapping):
        return None
    noted = next((tree[name] for name in _ACCURACIES if name in tree), None)
    if not isinstance(noted, int | float | np.number | Tensor):
        return None
    if isinstance(noted, Tensor) and noted.numel() != 1:
        return None
    accuracy = float(noted)
    return 100 * accuracy if accuracy <= 1 else accuracy


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return read_torch(file, str(path))


class _CompressedError(ValueError):
    """An archive that would become larger than its file."""


def read_torch(file: IO[bytes], origin: str) -> Any:
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


def _weights(tree: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
            tree = tree[wrapper]
    if not isinstance(tree, Mapping) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in tree.items()
    ):
        found = ", ".join(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
        raise ValueError(f"{path} holds no state dict; it holds {found}")
    return _without_prefixes(dict(tree))


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes off what wrappers put before every name, however many there were.

    Where some names are a student's and some a teacher's, the student's remain.
    """
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            shorter = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
            return _without_prefixes(shorter)
    students = {name: tensor for name, tensor in weights.items() if name.startswith("student.")}
    if students and any(name.startswith("teacher.") for name in weights):
        return _without_prefixes(students)
    return weights


def fill(network: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Puts weights into a network.

    Args:
        network: Of the same architecture.
        weights: Its state dict; counts of batches may be missing.
        origin: Where they come from, for the message.

    Raises:
        ValueError: If names or shapes differ, of which the message lists the first, or a weight is
            NaN or infinite.
    """
    own = network.state_dict()
    wrong = [
        f"{name}: {_shape(weights.get(name))} in the file, {_shape(own.get(name))} in the network"
        for name in sorted(own.keys() | weights.keys())
        if _shape(weights.get(name)) != _shape(own.get(name))
        and not name.endswith("num_batches_tracked")
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        listed = "\n  ".join(wrong[:3])
        raise ValueError(f"{origin} does not fit this network:\n  {listed}{more}")
    parameters = dict(network.named_parameters())
    for name, tensor in ((name, weights[name]) for name in own if name in weights):
        # Buffers may be infinite, as the masks of some transformers are.
        lost = ~tensor.isfinite() if name in parameters else tensor.isnan()
        if lost.any():
            raise ValueError(
                f"{origin}: {name} holds NaN or infinity; the file is damaged, or its training "
                "diverged"
            )
    network.load_state_dict(dict(weights), strict=False)


def hash_of(network: nn.Module) -> str:
    """Computes a hash of the weights of a network."""
    content = io.BytesIO()
    for name, tensor in sorted(network.state_dict().items()):
        content.write(name.encode())
        content.write(tensor.detach().cpu().contiguous().numpy().tobytes())
    return files.sha256(content.getvalue())


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
