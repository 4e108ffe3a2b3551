"""Classifies pictures with an exported student; needs numpy, pillow and onnxruntime, not torch.

    topkd export runs/digits/kd+topkd/seed0 --to onnx --out student
    python examples/serve_onnx.py student PICTURES

prints the path of every picture, its class and the probability of that class. A picture that cannot
be read is named, and the exit status is then 1.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BATCH = 64  # pictures at a time


class Student:
    """An exported network and what it needs to know of pictures.

    Args:
        folder: What ``topkd export --to onnx`` wrote.
        file: Which of its files.

    Raises:
        ValueError: If the folder's configuration tells of another file.
    """

    def __init__(self, folder: Path, file: str = "model.onnx") -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content = (folder / file).read_bytes()
        expected = self.config["files"].get(file, {}).get("sha256")
        if hashlib.sha256(content).hexdigest() != expected:
            raise ValueError(f"{folder / file} is not the file that config.json tells of")
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """Cuts out what networks see, scales and normalizes it: (3, size, size)."""
        size, box = self.config["size"], None
        picture = in_color(picture)
        if self.config["crop"] is not None:  # a share of the shorter side, in the middle
            shorter = min(picture.size)
            side = max(shorter * self.config["crop"], min(shorter, self.config["crop_least"]))
            left, top = ((length - side) / 2 for length in picture.size)
            if side == size:  # whole pixels, which are not scaled
                left, top = left // 1, top // 1
            box = (left, top, left + side, top + side)
        square = picture.resize((size, size), Image.Resampling.BILINEAR, box)
        pixels = np.asarray(square) / 255
        normalized = (pixels - self.config["mean"]) / self.config["std"]
        return normalized.astype(np.float32).transpose(2, 0, 1)

    def classify(self, pictures: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """Names the likeliest class of each picture, and its probability."""
        (logits,) = self.session.run(None, {"images": np.stack(pictures)})
        exponentials = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        best = probabilities.argmax(1)
        names = self.config["classes"]
        return [(names[k], float(row[k])) for k, row in zip(best, probabilities, strict=True)]


def in_color(picture: Image.Image) -> Image.Image:
    """Converts a picture of any kind to red, green and blue, of eight bits each, and upright."""
    picture.load()
    if picture.format != "TIFF":  # turned when it was loaded
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("floats have no known scale")
    if picture.mode.startswith("I"):  # gray of 16 bits, which Pillow would clip
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "P":  # a palette, perhaps with a transparent color
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def read(student: Student, paths: Sequence[Path]) -> Iterator[tuple[Path, np.ndarray]]:
    """Reads and prepares pictures; names those that cannot be read."""
    for path in paths:
        try:
            with Image.open(path) as picture:
                yield path, student.prepare(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            print(f"{path}: not a readable picture: {error}", file=sys.stderr)


def main() -> int:
    """Classifies a folder of pictures and prints what they are."""
    parser = argparse.ArgumentParser(description="Classify pictures with an exported student.")
    parser.add_argument("export", type=Path, help="what `topkd export --to onnx` wrote")
    parser.add_argument("pictures", type=Path, help="a folder, searched however deep")
    parser.add_argument("--file", default="model.onnx", help="or model.int8.onnx")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    options = parser.parse_args()

    known = Image.registered_extensions()
    paths = sorted(p for p in options.pictures.rglob("*") if p.suffix.lower() in known)
    if not paths:
        parser.exit(2, f"there is no picture in {options.pictures}\n")
    try:
        student = Student(options.export, options.file)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    done = 0
    for start in range(0, len(paths), BATCH):
        ready = dict(read(student, paths[start : start + BATCH]))
        answers = student.classify(list(ready.values())) if ready else []
        for path, (name, probability) in zip(ready, answers, strict=True):
            if options.json:
                answer = {"path": str(path), "class": name, "probability": probability}
                print(json.dumps(answer))
            else:
                print(f"{path}\t{name}\t{probability:.4f}")
        done += len(ready)
    return int(done < len(paths))


if __name__ == "__main__":
    sys.exit(main())
