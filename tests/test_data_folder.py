"""Folders as people have them: hidden files, links, and classes without train/ and val/."""

import io
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from typer.testing import CliRunner

from topkd.cli.app import app
from topkd.data import Data, InMemory
from topkd.data.shards import splits
from topkd.data.sources.folder import folder
from topkd.data.sources.webdataset import webdataset


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two pictures of each of two classes in train/, one in val/."""
    for place in ("train/cat/0", "train/cat/1", "train/dog/0", "train/dog/1", "val/cat/0"):
        picture(tmp_path / f"{place}.png")
    picture(tmp_path / "val/dog/0.png")
    return tmp_path


def shown(data, root):
    """What is trained on, as (path, class)."""
    names = [Path(path).relative_to(root).as_posix() for path in data.train.stored.paths]
    return list(zip(names, [data.classes[label] for label in data.train.target], strict=True))


OWN = [
    ("train/cat/0.png", "cat"),
    ("train/cat/1.png", "cat"),
    ("train/dog/0.png", "dog"),
    ("train/dog/1.png", "dog"),
]


@pytest.mark.parametrize(
    "name",
    [
        "train/.ipynb_checkpoints/0.png",  # as a class
        "train/cat/.ipynb_checkpoints/0-checkpoint.png",
        "train/cat/._0.png",  # macOS, on other file systems
        "train/@eaDir/0.png",  # Synology
        "train/cat/@eaDir/0.png/thumbnail.png",
        "train/__MACOSX/cat/0.png",  # archives made by macOS
        "train/dog/.hidden.png",
    ],
)
def test_what_programs_leave_is_no_data_and_is_named(tree, name):
    picture(tree / name)
    data = folder(root=str(tree), size=8)
    assert list(data.classes) == ["cat", "dog"]
    assert shown(data, tree) == OWN
    (line,) = data.faults.lines()
    hidden = next(part for part in Path(name).parts if part[0] in ".@_")
    assert hidden in line


@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("train/cat/up", "train"),
        ("train/cat/deep/top", "."),
        ("train/cat/more", "train/dog"),
        ("train/cat/here", "train/cat"),
        ("train/dog/part", "train/cat/old"),
    ],
)
def test_links_back_into_the_tree_are_left_out_and_named(tree, link, to):
    picture(tree / "train/cat/old/2.png")
    (tree / link).parent.mkdir(exist_ok=True)
    (tree / link).symlink_to(tree / to)
    data = folder(root=str(tree), size=8)
    assert shown(data, tree) == [*OWN[:2], ("train/cat/old/2.png", "cat"), *OWN[2:]]
    (line,) = data.faults.lines()
    assert str(tree / link) in line


def test_links_out_of_the_tree_are_followed_once(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    picture(outside / "far/2.png")
    (outside / "far/round").symlink_to(outside)  # a circle outside
    shutil.move(tree / "train/dog", outside / "dog")
    (tree / "train/dog").symlink_to(outside / "dog")  # a class that lies elsewhere
    (tree / "train/cat/far").symlink_to(outside / "far")
    data = folder(root=str(tree), size=8)
    assert shown(data, tree) == [*OWN[:2], ("train/cat/far/2.png", "cat"), *OWN[2:]]


def test_one_folder_is_not_two_classes(tree):
    for part in ("train", "val"):
        (tree / part / "kitten").symlink_to(tree / part / "cat")
    with pytest.raises(ValueError, match="train: the classes 'cat' and 'kitten' are the same"):
        folder(root=str(tree))


def test_a_folder_that_may_not_be_read_is_named(tree, monkeypatch):
    """Root may read everything, so the system's answer is made here."""
    (tree / "train/cat/secret").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="train/cat/secret"):
        folder(root=str(tree))


@pytest.mark.parametrize("place", ["", "./", "set/", "__MACOSX/set/"])
def test_what_macos_adds_to_archives_is_no_sample(tmp_path, place):
    """Its tar writes a second file for each, with what only macOS knows of it."""
    pytest.importorskip("webdataset")
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    plain = "" if place == "__MACOSX/set/" else place
    members = {f"{place}._0.png": b"Mac OS X", f"{place}._0.cls": b"Mac OS X"}
    members |= {f"{plain}0.png": png.getvalue(), f"{plain}0.cls": b"0"}
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for name, content in members.items():
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    data = webdataset(root=str(tmp_path), size=8)
    assert data.train.target.tolist() == [0]
    assert data.train.stored.name(0).endswith(f"train.tar: {plain}0.png")


@pytest.mark.parametrize("name", ["._train-0.parquet", ".cache/train-0.parquet"])
def test_hidden_shards_are_no_shards(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for path in (name, "train.parquet", "val.parquet"):
        (tmp_path / path).touch()
    found = [[path.name for path in part] for part in splits(tmp_path, ".parquet")]
    assert found == [["train.parquet"], ["val.parquet"]]


# --- Classes without train/ and val/ -------------------------------------------------------------


def test_validation_pictures_are_never_replaced(tree):
    for path in tree.glob("train/*/*.png"):
        path.write_bytes(b"")
    data = folder(root=str(tree), size=8, on_error="skip").with_validation(0.5)
    with pytest.raises(ValueError, match="nor is any other of class 0"):
        data.train.read(torch.arange(1), None)
    with pytest.raises(ValueError, match="it is empty"):
        data.test.read(torch.arange(1), None)


@pytest.fixture
def flat(tmp_path):
    """Fifty pictures of three classes, 10, 15 and 25."""
    for count, name in ((10, "ant"), (15, "bee"), (25, "cow")):
        for number in range(count):
            picture(tmp_path / name / f"{number:02}.png", seed=number)
    return tmp_path


def paths(images, root):
    return [Path(path).relative_to(root).as_posix() for path in images.stored.paths]


def test_classes_without_a_split_are_split(flat):
    data = folder(root=str(flat), size=8, split=0.2)
    train, test = paths(data.train, flat), paths(data.test, flat)
    every = sorted(path.relative_to(flat).as_posix() for path in flat.rglob("*.png"))
    assert sorted(train + test) == every
    assert list(data.classes) == ["ant", "bee", "cow"]
    for part, found in ((data.train, train), (data.test, test)):
        assert [data.classes[label] for label in part.target] == [p.split("/")[0] for p in found]
    # As many of each class as scikit-learn's stratified split has.
    names = [path[:3] for path in every]
    _, expected = train_test_split(names, test_size=0.2, stratify=names)
    assert Counter(path[:3] for path in test) == Counter(expected)
    assert data.eval_split == "test"


def test_a_split_is_always_the_same_and_no_first_pictures(flat):
    first = folder(root=str(flat), size=8, split=0.2)
    torch.manual_seed(99)
    again = folder(root=str(flat), size=8, split=0.2)
    assert paths(again.test, flat) == paths(first.test, flat)
    assert paths(first.test, flat)[:2] != ["ant/00.png", "ant/01.png"]


def test_a_lone_train_folder_is_split_too(flat, tmp_path_factory):
    root = tmp_path_factory.mktemp("lone")
    shutil.move(flat, root / "train")
    data = folder(root=str(root), size=8, split=0.4)
    assert len(data.train.target) == 30
    assert list(data.classes) == ["ant", "bee", "cow"]


def test_pictures_of_a_split_that_are_evaluated_on_are_never_replaced(flat):
    for path in flat.rglob("*.png"):
        path.write_bytes(b"")
    data = folder(root=str(flat), size=8, split=0.2, on_error="skip")
    with pytest.raises(ValueError, match="it is empty"):
        data.test.read(torch.arange(1), None)


def test_the_message_tells_of_the_split(flat):
    with pytest.raises(FileNotFoundError, match=r"needs train/ and val/ or test/; data.split=0.2"):
        folder(root=str(flat))


def test_a_split_of_what_is_split_is_refused(tree):
    with pytest.raises(ValueError, match="has train/ and val/ already; leave out data.split"):
        folder(root=str(tree), split=0.2)


@pytest.mark.parametrize("split", [0.0, 1.0, -0.1, 2.0])
def test_shares_that_are_none_are_refused(flat, split):
    with pytest.raises(ValueError, match=f"split must be between 0 and 1, got {split}"):
        folder(root=str(flat), split=split)


@pytest.mark.parametrize("split", [0.01, 0.99])
def test_a_split_that_leaves_a_class_without_pictures_is_refused(flat, split):
    with pytest.raises(ValueError, match=f"a split of {split} leaves a class without images"):
        folder(root=str(flat), split=split)


def test_a_split_is_trained_on_by_a_recipe(flat):
    result = CliRunner().invoke(
        app,
        ["run", "own/folder", f"data.root={flat}", "data.split=0.4", "data.size=8", "epochs=1"]
        + ["teacher=null", "losses=[{name: ce}]", "student={model: resnet8x0.25}", "controls={}"]
        + ["batch_size=8", "--out", str(flat.parent / "runs"), "--quiet"],
    )
    assert result.exit_code == 0, result.output


# --- Limits --------------------------------------------------------------------------------------


def test_a_limit_that_leaves_a_class_without_images_says_so():
    target = torch.tensor([0] * 20 + [1] * 40 + [2] * 60)
    images = InMemory(torch.zeros(120, 4, 4, 3).byte(), target, (0.5,) * 3, (0.5,) * 3, 1, False)
    data = Data("uneven", images, images, ["a", "b", "c"], images.mean, images.std)
    assert data.with_limit(3).train.target.tolist() == [0, 1, 2]
    limited = data.with_limit(2)  # the largest classes keep an image
    assert limited.train.target.tolist() == [1, 2]
    assert limited.faults.lines() == ["1 class has no training picture: a"]
    assert limited.with_limit(1).faults.empty.count("a") == 1
