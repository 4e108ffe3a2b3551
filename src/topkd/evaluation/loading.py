"""Trained classifiers loaded from runs, exports and weights files."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from topkd.data import DATA
from topkd.data.augment import normalize
from topkd.data.pictures import CropConfig, evaluation_pixels, in_color, open_picture, stacked
from topkd.features import FeatureExtractor
from topkd.models import checkpoint, factory
from topkd.models.reused import rebuild

if TYPE_CHECKING:
    from PIL import Image

BATCH = 64  # pictures per forward pass; does not affect the results
NEEDED = ("model", "classes", "mean", "std", "size")


class Classifier(nn.Module):
    """A trained network with its classes and its preprocessing, in eval mode.

    Args:
        features: The network.
        about: The metadata of its weights: classes, size, mean, std and data section.

    Attributes:
        features: The network as a feature extractor; ``features.network`` is the bare module.
        classes: Names of the classes, in the order of the logits.
        mean: Channel means of the normalization, for values in [0, 1].
        std: Channel standard deviations of the normalization.
        size: Height and width of the input, in pixels.
        crop: How pictures are cropped and resized for evaluation.
    """

    def __init__(self, features: FeatureExtractor, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.features = features
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self.mean: tuple[float, ...] = tuple(about["mean"])
        self.std: tuple[float, ...] = tuple(about["std"])
        self.size: int = about["size"]
        self.crop = evaluation_crop(about)
        self.eval()

    def normalize(self, images: Tensor) -> Tensor:
        """Normalizes images (n, 3, h, w) with values in [0, 1]."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Computes the logits (n, classes) of normalized images (n, 3, size, size)."""
        return self.features(images).logits

    @torch.no_grad()
    def predict(
        self, pictures: Tensor | Image.Image | str | PathLike[str] | Sequence[Any]
    ) -> Tensor:
        """Computes class probabilities.

        Args:
            pictures: Paths or PIL images, which are cropped and resized as for evaluation, or a
                tensor (n, 3, size, size) of bytes or of floats in [0, 1], which is only normalized.

        Returns:
            Probabilities (n, classes), float32, on the CPU. Rows sum to 1.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: If a picture cannot be read, a tensor has another shape or range, or a
                logit is NaN or infinite.
        """
        if isinstance(pictures, str | PathLike) or hasattr(pictures, "convert"):
            pictures = [pictures]
        if isinstance(pictures, Tensor):
            self._check(pictures)
        parameter = next(self.parameters(), torch.zeros(()))
        found = [torch.zeros(0, len(self.classes))]
        for start in range(0, len(pictures), BATCH):
            images = self._normalized(pictures[start : start + BATCH])
            logits = self(images.to(parameter.device, parameter.dtype))
            found.append(logits.float().cpu().softmax(1))
            invalid = ~found[-1].isfinite().all(1)
            if invalid.any():
                raise ValueError(
                    f"the network returns NaN or infinity for picture "
                    f"{start + int(invalid.nonzero()[0])}"
                )
        return torch.cat(found)

    def _check(self, images: Tensor) -> None:
        expected = (3, self.size, self.size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"expected a tensor (n, 3, {self.size}, {self.size}), got {tuple(images.shape)}; "
                "paths and PIL images are resized"
            )
        if images.dtype != torch.uint8:
            if not images.is_floating_point():
                raise ValueError(f"expected uint8 or floats in [0, 1], got {images.dtype}")
            if len(images) and not (images.amin() >= 0 and images.amax() <= 1):
                raise ValueError(
                    f"expected values in [0, 1] before normalization, got "
                    f"{images.amin():.4g} to {images.amax():.4g}"
                )

    def _normalized(self, pictures: Tensor | Sequence[Any]) -> Tensor:
        if not isinstance(pictures, Tensor):
            pixels = stacked(self.size, self._pixels, pictures)
        elif pictures.is_floating_point():
            return self.normalize(pictures.float())
        else:
            pixels = pictures.permute(0, 2, 3, 1)
        return normalize(pixels.cpu(), self.mean, self.std)  # exactly as data sets do

    def _pixels(self, picture: Any) -> np.ndarray:
        is_path = isinstance(picture, str | PathLike)
        image = open_picture(Path(picture)) if is_path else in_color(picture)
        return evaluation_pixels(image, self.crop)


def load(
    path: str | PathLike[str], *, network: nn.Module | None = None, trust: bool = False
) -> Classifier:
    """Loads a trained classifier.

    Args:
        path: The folder of a run or of an export, or a weights file that topkd wrote.
        network: A network of the same architecture, for a student that was given as a module. It is
            copied.
        trust: Whether the file may name a model as ``module:callable``, which runs code.

    Raises:
        FileNotFoundError: If there is no such run or file.
        ValueError: If the file does not describe a classifier, was altered, does not fit
            ``network``, or names code without ``trust``.

    Examples:
        >>> classifier = load("runs/digits/kd+topkd/seed0")  # doctest: +SKIP
        >>> probabilities = classifier.predict(["cat.png"])  # doctest: +SKIP
    """
    file = checkpoint.weights_file(Path(path))
    about = checkpoint.read_about(file)
    missing = [key for key in NEEDED if key not in about]
    if missing:
        raise ValueError(
            f"{file} does not record {', '.join(missing)}: it was not written by a run of topkd"
        )
    if network is None and not trust:
        factory.refuse_code(about["model"], str(file))
    restored, _ = restore(about, checkpoint.load_weights(file), str(file), given=network)
    return Classifier(restored, about)


def restore(
    about: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    origin: str,
    which: checkpoint.Which = "plain",
    given: nn.Module | None = None,
) -> tuple[FeatureExtractor, str]:
    """Builds the network that metadata describe and loads its weights.

    Args:
        about: Model, classes and size; optionally taps and the description of a reused classifier.
        weights: As :func:`topkd.models.checkpoint.load_weights` returns them.
        origin: Where the weights come from, for messages.
        which: The weights to load if there are plain and averaged ones.
        given: A network of the same architecture in place of the named one; it is copied.

    Returns:
        The network in eval mode, and a note for the user if plain and averaged weights exist.

    Raises:
        ValueError: If the model is unknown, or the weights do not fit.
    """
    network = build_network(about, given)
    note = checkpoint.fill(network.network, weights, origin, which)
    return network.eval(), note


def build_network(about: Mapping[str, Any], given: nn.Module | None = None) -> FeatureExtractor:
    """Builds the untrained network that metadata describe; see :func:`restore`."""
    model, size, taps = about["model"], about["size"], about.get("taps") or {}
    if given is None:
        network = factory.build(model, len(about["classes"]), size, **taps)
    else:
        network = factory.wrap(copy.deepcopy(given), model, (3, size, size), **taps)
    return rebuild(network, about["reused"]) if about.get("reused") else network


def evaluation_crop(about: Mapping[str, Any]) -> CropConfig:
    """Reads from metadata how pictures are cropped and resized for evaluation.

    Data sets of one image size, and those with ``padding``, resize the complete picture.
    """
    data = about.get("data") or {}
    load_data = DATA.get(data.get("name", ""))
    options = {} if load_data is None else inspect.signature(load_data).parameters
    complete = "padding" not in options or data.get("padding") is not None
    crop = None if complete else data.get("crop")
    padding = 0 if complete else None
    return CropConfig(about["size"], padding, crop, False, about["mean"], about["std"])
