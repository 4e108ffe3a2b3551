"""Export formats: writing a network and loading it again."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from topkd.data import Images
from topkd.evaluation.loading import load
from topkd.models import checkpoint

BATCH = 64  # images per forward pass; does not affect the results
CALIBRATION = 512  # number of training images for calibration, and for validation

Predictor = Callable[[Tensor], Tensor]
"""Maps normalized images (n, 3, size, size) to logits (n, classes)."""


@dataclass(frozen=True)
class Subject:
    """The network to export."""

    network: nn.Module  # bare module in eval mode, on the CPU
    about: Mapping[str, Any]  # metadata of the weights
    train: Images | None  # calibration data

    @property
    def images(self) -> Tensor:
        """Two example images; a batch of one would be traced as a constant size."""
        return torch.zeros(2, 3, self.about["size"], self.about["size"])


@dataclass(frozen=True)
class Format:
    """An export format."""

    file: str
    about: str
    write: Callable[[Subject, Path], dict[str, Any]]  # returns metadata of the file
    read: Callable[[Path], Predictor]
    packages: tuple[str, ...] = ()
    is_rounded: bool = False  # outputs differ from the network's


def require(package: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        ModuleNotFoundError: If it is not installed; the message has the install command.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        message = f"this needs {package}: pip install 'topkd[export]'"
        raise ModuleNotFoundError(message, name=package) from error


def _write_safetensors(subject: Subject, path: Path) -> dict[str, Any]:
    checkpoint.save_weights(path, subject.network, subject.about)
    return {}


def _read_safetensors(path: Path) -> Predictor:
    return load(path, trust=True).features.network  # trusted: this process wrote the file


def _traced(subject: Subject, write: Callable[..., Any], **options: Any) -> Any:
    """Calls a tracer of torch with a dynamic batch size."""
    any_number = ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # internal warnings of torch
        try:
            return write(subject.network, (subject.images,), dynamic_shapes=any_number, **options)
        except Exception as error:  # third-party models can raise anything
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"{subject.about['model']} cannot be traced: {reason}") from error


def _write_torch_export(subject: Subject, path: Path) -> dict[str, Any]:
    program = _traced(subject, torch.export.export)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains local source paths
    torch.export.save(program, path)
    return {"torch": torch.__version__}


def _read_torch_export(path: Path) -> Predictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # internal warnings of torch
        return torch.export.load(path).module()


def _write_onnx(subject: Subject, path: Path) -> dict[str, Any]:
    require("onnxscript")
    onnx = require("onnx")
    names = {"input_names": ["images"], "output_names": ["logits"]}
    program = _traced(subject, torch.onnx.export, dynamo=True, verbose=False, **names)
    model = program.model_proto
    graph = model.graph
    model.ClearField("metadata_props")
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")  # local source paths
        part.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("value_info")  # inferred by readers; quantization invalidates parts of it
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return {"opset": next(o.version for o in model.opset_import if not o.domain)}


def _read_onnx(path: Path) -> Predictor:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_int8(subject: Subject, path: Path) -> dict[str, Any]:
    """Quantizes statically and dynamically and keeps the one with the higher agreement.

    Static quantization calibrates activation ranges on training images, dynamic quantization on
    each batch. The choice uses other training images, never test images.
    """
    quantization = require("onnxruntime.quantization")
    if subject.train is None:
        raise ValueError("onnx-int8 needs training images for calibration: give --data root=FOLDER")
    order = np.random.default_rng(0).permutation(len(subject.train.target))
    # A small set is split evenly between calibration and validation.
    count = min(CALIBRATION, len(order) // 2)
    if not count:
        raise ValueError("onnx-int8 needs at least two training images")
    calibration, validation = (
        torch.from_numpy(part) for part in (order[:count], order[count : 2 * count])
    )
    plain, ready = path.with_name(FORMATS["onnx"].file), path.with_suffix(".ready")
    if not plain.exists():  # already written by this export
        _write_onnx(subject, plain)
    quantization.quant_pre_process(plain, ready, skip_symbolic_shape=True)
    ways = {way: path.with_suffix(f".{way}") for way in ("static", "dynamic")}
    reader = _reader(subject.train, calibration)
    quantization.quantize_static(ready, ways["static"], reader, per_channel=True)
    # Unsigned: older runtimes have no signed integer convolution.
    kind = quantization.QuantType.QUInt8
    quantization.quantize_dynamic(ready, ways["dynamic"], per_channel=True, weight_type=kind)
    same = {
        way: _agreement(subject.network, _read_onnx(file), subject.train, validation)
        for way, file in ways.items()
    }
    best = max(same, key=same.__getitem__)
    ways[best].rename(path)
    return {"quantization": best, "calibration_images": count, "agreement_on_training": same}


@torch.no_grad()
def _agreement(network: Predictor, other: Predictor, images: Images, index: Tensor) -> float:
    """Computes the percentage of images for which both predict the same class."""
    same = 0
    for part in index.split(BATCH):
        shown = images.read(part, None)
        same += int((network(shown).argmax(1) == other(shown).argmax(1)).sum())
    return round(100 * same / len(index), 2)


def _reader(images: Images, index: Tensor) -> Any:
    """Builds a calibration data reader of onnxruntime."""
    batches: Iterator[Tensor] = (images.read(part, None) for part in index.split(BATCH))

    class Reader(require("onnxruntime.quantization").CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()


_ONNX = ("onnx", "onnxscript", "onnxruntime")

FORMATS: Mapping[str, Format] = {
    "safetensors": Format(
        "model.safetensors",
        "weights for topkd and torch, cannot run code",
        _write_safetensors,
        _read_safetensors,
    ),
    "onnx": Format("model.onnx", "for any ONNX runtime", _write_onnx, _read_onnx, _ONNX),
    "torch-export": Format(
        "model.pt2",
        "for torch, without the source of the network",
        _write_torch_export,
        _read_torch_export,
    ),
    "onnx-int8": Format(
        "model.int8.onnx",
        "ONNX, quantized to 8 bits",
        _write_int8,
        _read_onnx,
        _ONNX,
        is_rounded=True,
    ),
}
"""Name -> export format."""
