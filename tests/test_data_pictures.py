"""Pictures as cameras, scanners and microscopes write them: orientation, depth, size."""

import io
import struct
import zlib
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from topkd.data import DATA, from_dataset
from topkd.data.pictures import CropConfig, CropOptions, in_color, open_bytes
from topkd.data.sources.folder import folder
from topkd.data.sources.parquet import parquet
from topkd.data.sources.webdataset import webdataset

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
ORIENTATION = 274
# How EXIF 2.3 has a picture stored, for a viewer that undoes it.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def test_type_checkers_see_the_options_of_a_crop():
    assert get_type_hints(CropOptions) == get_type_hints(CropConfig)


def upright(height=16, width=16):
    """A picture of which no turn and no mirror image is itself."""
    corner = np.arange(height * width).reshape(height, width) * 255 // (height * width)
    return np.stack([corner, 255 - corner, corner // 2], -1).astype(np.uint8)


def turned(orientation, suffix):
    """The bytes of an upright picture that is stored otherwise."""
    picture = Image.fromarray(upright())
    if orientation in STORED:
        picture = picture.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = io.BytesIO()
    options = {"quality": 100, "subsampling": 0} if suffix == "jpeg" else {"lossless": True}
    picture.save(content, suffix, exif=exif, **options)
    return content.getvalue()


@pytest.mark.parametrize("suffix", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, suffix):
    with open_bytes(turned(orientation, suffix)) as picture:
        found = np.asarray(in_color(picture)).astype(int)
    assert np.abs(found - upright()).max() <= (12 if suffix == "jpeg" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no such thing", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"x"]
)
def test_metadata_that_cannot_be_read_turn_nothing(exif):
    content = io.BytesIO()
    Image.fromarray(upright()).save(content, "png", exif=exif)
    with open_bytes(content.getvalue()) as picture:
        assert np.array_equal(in_color(picture), upright())


@pytest.fixture
def sideways(tmp_path):
    """The same two pictures, stored sideways, as every kind of source has them."""
    content = turned(6, "png")
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(content)
    return tmp_path, content


def by_folder(root, content, **frame):
    return folder(root=str(root), **frame, **PLAIN)


def by_parquet(root, content, **frame):
    pa, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part in ("train", "val"):
        rows = {"image": [{"bytes": content}] * 2, "label": [0, 1]}
        files.write_table(pa.table(rows), root / f"{part}.parquet")
    return parquet(root=str(root), **frame, **PLAIN)


def by_webdataset(root, content, **frame):
    wds = pytest.importorskip("webdataset")
    for part in ("train", "val"):
        with wds.TarWriter(str(root / f"{part}.tar")) as tar:
            for label in (0, 1):
                tar.write({"__key__": str(label), "png": content, "cls": label})
    return webdataset(root=str(root), **frame, **PLAIN)


def by_dataset(root, content, **frame):
    samples = [(open_bytes(content), label) for label in (0, 1)]
    return from_dataset(samples, samples, **frame, **PLAIN)


def test_a_picture_that_would_grow_is_not_decoded(tmp_path):
    path, content = tmp_path / "train/a/0.png", bytearray()
    for kind, data in (
        (b"IHDR", struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1 << 20))),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a/0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(ValueError, match=rf"{path}: not a readable image: .*decompression bomb"):
        folder(root=str(tmp_path)).train.read(torch.arange(1), None)


@pytest.mark.parametrize("load", [by_folder, by_parquet, by_webdataset, by_dataset])
def test_every_source_turns_pictures_upright(sideways, load):
    data = load(*sideways, size=16, padding=0)
    for part in (data.train, data.test):
        for found in part.read_bytes(torch.arange(2), None):
            assert np.array_equal(found, upright())


# --- Depth ---------------------------------------------------------------------------------------

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(values, suffix, **options):
    content = io.BytesIO()
    Image.fromarray(values).save(content, suffix, **options)
    return content.getvalue()


def big_endian(values):
    """A TIFF of a kind that Pillow does not write: a header, a list of tags, the pixels."""
    height, width = values.shape
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 110, 278: height, 279: 512}
    listed = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"MM\0*" + struct.pack(">IH", 8, len(tags))
    return head + listed + bytes(4) + values.astype(">u2").tobytes()


SIXTEEN = GRAY.astype(np.uint16) * 257
DEEP = {
    "16 bits, png": saved(SIXTEEN, "png"),
    "16 bits, tiff": saved(SIXTEEN, "tiff"),
    "16 bits, big-endian tiff": big_endian(SIXTEEN),
    "16 bits, pgm": b"P5 16 16 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "32 bits": saved(GRAY.astype(np.int32) * 257, "tiff"),
    "floats": saved((GRAY / 255).astype(np.float32), "tiff"),
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_deep_pictures_have_the_gray_of_the_same_picture_of_eight_bits(content):
    with open_bytes(content) as picture:
        assert np.array_equal(in_color(picture), np.stack([GRAY] * 3, -1))


@pytest.mark.parametrize("least", [0, 1])
def test_a_png_of_16_bits_is_one_whichever_mode_pillow_gives_it(least):
    """Before version 11 Pillow opened it in its mode of 32 bits."""
    picture = Image.fromarray(np.full((2, 2), least * 257, np.int32))
    picture.format = "PNG"
    assert (np.asarray(in_color(picture)) == least).all()


LOST = {
    "integers above 16 bits": (np.array([[0, 65536]], np.int32), "0 to 65536"),
    "negative integers": (np.array([[-1, 100]], np.int32), "-1 to 100"),
    "bytes in 32 bits": (np.array([[0, 255]], np.int32), "0 to 255"),
    "floats above 1": (np.array([[0, 255]], np.float32), "0 to 255"),
    "negative floats": (np.array([[-0.5, 0.5]], np.float32), "-0.5 to 0.5"),
    "floats that are none": (np.array([[0, np.nan]], np.float32), "nan"),
}


@pytest.mark.parametrize(("values", "got"), LOST.values(), ids=LOST)
def test_pictures_whose_scale_nobody_knows_are_named(tmp_path, values, got):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(GRAY).save(tmp_path / place / "0.png")
    Image.fromarray(values).save(tmp_path / "train/b/1.tiff")
    data = folder(root=str(tmp_path), size=8)
    with pytest.raises(ValueError, match=f"train/b/1.tiff: not a readable image: .*{got}"):
        data.train.read(torch.arange(3), None)


# --- Crop ----------------------------------------------------------------------------------------


def seen(size, picture, **options):
    """The pixels of one picture that a network is shown in evaluation."""
    images = from_dataset([(picture, 0)], [(picture, 0)], size=size, **PLAIN, **options).test
    return images.read_bytes(torch.tensor([0]), None)[0].numpy()


@pytest.mark.parametrize("size", [8, 28, 32])
def test_pictures_of_the_size_are_left_alone(size):
    pixels = upright(size, size)
    assert np.array_equal(seen(size, pixels), pixels)


@pytest.mark.parametrize("shape", [(32, 45), (45, 32)])
def test_of_oblong_pictures_whose_shorter_side_has_the_size_the_middle_is_left_alone(shape):
    pixels = upright(*shape)
    top, left = ((length - 32) // 2 for length in shape)
    assert np.array_equal(seen(32, pixels), pixels[top : top + 32, left : left + 32])


@pytest.mark.parametrize("length", [5, 20, 31])
def test_of_smaller_pictures_all_is_scaled(length):
    picture = Image.fromarray(upright(length, length))
    expected = picture.resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(seen(32, picture), expected)


@pytest.mark.parametrize("length", [33, 36])
def test_of_pictures_up_to_8_7_of_the_size_the_middle_is_not_scaled(length):
    pixels, edge = upright(length, length), (length - 32) // 2
    assert np.array_equal(seen(32, pixels), pixels[edge : edge + 32, edge : edge + 32])


@pytest.mark.parametrize(
    ("crop", "size", "shape"),
    [
        (None, 28, (64, 64)),
        (None, 28, (96, 64)),
        (0.875, 28, (64, 64)),
        (0.875, 112, (64, 64)),
        (1.0, 28, (64, 64)),
        (1.0, 28, (64, 96)),
        (0.5, 16, (64, 64)),
        (0.9, 36, (80, 80)),
    ],
)
def test_the_crop_is_that_of_torchvision_and_timm(crop, size, shape):
    """They scale the shorter side to size / crop and cut out the middle; here it is the converse.

    What differs is what scaling reads beyond the cut, and where a side is rounded to pixels.
    """
    from torchvision.transforms.v2 import functional

    rows, columns = np.mgrid[: shape[0], : shape[1]]
    waves = [128 + 100 * np.sin(rows / a + columns / b) for a, b in ((9, 14), (20, 11), (15, 30))]
    picture = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    scaled = functional.resize(picture, [round(size / (crop or 0.875))])
    expected = np.asarray(functional.center_crop(scaled, [size, size])).astype(int)
    found = seen(size, picture, **({} if crop is None else {"crop": crop})).astype(int)
    inner = np.abs(found - expected)[1:-1, 1:-1]
    assert inner.mean() < 3
    assert inner.max() < 12


@pytest.mark.parametrize("crop", [0.0, -0.5, 1.01])
def test_crops_that_are_none_are_refused(crop):
    with pytest.raises(ValueError, match=f"crop must be above 0 and at most 1, got {crop}"):
        seen(8, upright(), crop=crop)


def test_padding_leaves_nothing_to_crop():
    with pytest.raises(ValueError, match="padding scales the complete picture; leave out crop"):
        seen(8, upright(), crop=0.9, padding=1)


@pytest.mark.parametrize("load", [by_folder, by_parquet, by_webdataset, by_dataset])
def test_every_source_has_the_crop(sideways, load):
    data = load(*sideways, size=8, crop=0.5)
    for found in data.test.read_bytes(torch.arange(2), None):
        assert np.array_equal(found, upright()[4:12, 4:12])


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_pictures_that_a_program_would_have_to_read_are_refused(tmp_path, name):
    postscript = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(ran) (w) file closefile\n%%EOF\n"
    )
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "b.png")
        (tmp_path / split / "a" / name).write_bytes(postscript)
    data = DATA["folder"](root=str(tmp_path), size=8)
    with pytest.raises(ValueError, match=f"{name}: not a readable image"):
        data.test.read(torch.arange(2), None)
