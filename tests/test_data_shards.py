"""Pictures in parquet files, tar shards and Python: the same ones, from wherever they come."""

import io
import itertools
import json
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from topkd.config.sections import DataSection
from topkd.config.validation import RecipeError
from topkd.data import DATA, Data, InMemory, from_dataset, plain_batches, training_batches
from topkd.data.base import ReadGroups
from topkd.data.batches import shuffled
from topkd.data.pictures import MEAN, STD
from topkd.data.shards import refuse_gaps
from topkd.data.sources.folder import folder
from topkd.data.sources.parquet import parquet
from topkd.data.sources.webdataset import webdataset
from topkd.evaluation import metrics
from topkd.features import FeatureExtractor
from topkd.training.build import load_data

pa = pytest.importorskip("pyarrow")
files = pytest.importorskip("pyarrow.parquet")
wds = pytest.importorskip("webdataset")


def pixels(count, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def png(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def write_parquet(path, contents, labels, *, names=None, groups=3, image="image", label="label"):
    """A file as Hugging Face writes it: bytes and path of a picture in a struct."""
    rows = [{"bytes": content, "path": None} for content in contents]
    table = pa.table({image: rows, label: labels, "id": list(range(len(rows)))})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(table, path, row_group_size=groups)


def write_tar(path, contents, labels, *, first=0, suffix="png", label="cls"):
    """A shard as webdataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as writer:
        for number, (content, value) in enumerate(zip(contents, labels, strict=True), first):
            writer.write({"__key__": f"{number:06}", suffix: content, label: str(value).encode()})


def read_all(images, key=None):
    return images.read(torch.arange(len(images.target)), key)


def expected_of(images, labels):
    """What is to come of pictures of one size, cropped from a border of two."""
    return InMemory(torch.from_numpy(images), torch.tensor(labels), MEAN, STD, 2, flip=True)


def assert_same(found, expected):
    assert torch.equal(found.target, expected.target)
    for key in (None, (0, 1), (3, 2)):
        assert torch.equal(read_all(found, key), read_all(expected, key))


SMALL = {"size": 16, "padding": 2}


# --- The same pictures from everywhere -----------------------------------------------------------


def learn(data):
    """One epoch of a small network, seeded, and what it makes of the test images."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    network = nn.Sequential(*layers, nn.Linear(128, len(data.classes)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for batch in training_batches(data.train, 20, seed=0, epoch=1):
        loss = F.cross_entropy(network(batch.images), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tapped = FeatureExtractor(network, maps=["0"], head="4").eval()
    return metrics.predict(tapped, data.test, torch.device("cpu"))


def test_pictures_of_every_source_train_the_same_network(tmp_path, shared):
    shard = next(shared("data/cifar100").rglob("test-*.parquet"))
    table = files.read_table(shard, columns=["img", "coarse_label"]).slice(0, 500)
    by_class = np.argsort(table["coarse_label"].to_numpy(), kind="stable")  # as folders are read
    contents = [table["img"][int(row)].as_py()["bytes"] for row in by_class]
    labels = [table["coarse_label"][int(row)].as_py() for row in by_class]
    names = [f"class {label:02}" for label in range(20)]
    (tmp_path / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    assert set(labels) == set(range(20))
    for part, rows in (("train", slice(0, None, 2)), ("val", slice(1, None, 2))):
        own, numbers = contents[rows], labels[rows]
        write_parquet(tmp_path / "parquet" / f"{part}-0.parquet", own, numbers, names=names)
        for first in range(0, len(own), 100):
            rows = slice(first, first + 100)
            place = tmp_path / "tar" / f"{part}-{first // 100}.tar"
            write_tar(place, own[rows], numbers[rows], first=first)
        for row, (content, label) in enumerate(zip(own, numbers, strict=True)):
            path = tmp_path / "tree" / part / names[label] / f"{row:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    from torchvision.datasets import ImageFolder

    options = {"size": 32, "padding": 4}
    sources = {
        "folder": folder(root=str(tmp_path / "tree"), **options),
        "parquet": parquet(root=str(tmp_path / "parquet"), **options),
        "webdataset": webdataset(
            root=str(tmp_path / "tar"), classes=str(tmp_path / "classes.txt"), **options
        ),
        "dataset": from_dataset(
            *(ImageFolder(tmp_path / "tree" / part) for part in ("train", "val")), **options
        ),
    }
    answers = {name: learn(data) for name, data in sources.items()}
    for name, data in sources.items():
        assert list(data.classes) == names, name
        assert torch.equal(answers[name].logits, answers["folder"].logits), name
        assert metrics.top_k(answers[name], 1) == metrics.top_k(answers["folder"], 1)
    assert len(answers["folder"].logits.argmax(1).unique()) > 1


# --- The order of pictures that are stored in blocks ---------------------------------------------


class Stored:
    """Images that are nothing but their blocks."""

    def __init__(self, sizes, buffer):
        self.blocks = ReadGroups(np.repeat(np.arange(len(sizes)), sizes), buffer)
        self.target = torch.zeros(sum(sizes))


@pytest.mark.parametrize("sizes", [[10] * 50, [1] * 300, [300, 1, 7], list(range(1, 30))])
@pytest.mark.parametrize("buffer", [1, 40])
def test_every_image_is_shown_once(sizes, buffer):
    order = shuffled(Stored(sizes, buffer), 0, 1)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_few_blocks_are_open_at_a_time():
    images = Stored([10] * 200, 60)
    orders = {}
    for key in ((0, 1), (0, 2), (1, 1)):
        blocks = images.blocks.of[shuffled(images, *key)]
        first = [int(np.argmax(blocks == b)) for b in range(200)]
        last = [len(blocks) - int(np.argmax(blocks[::-1] == b)) for b in range(200)]
        for time in range(0, 2000, 7):
            there = sum(a <= time < b for a, b in zip(first, last, strict=True))
            assert there <= 60 / 10 + 2
        orders[key] = tuple(np.argsort(first))
        neighbors = np.mean(blocks[1:] == blocks[:-1])
        assert neighbors < 0.3  # a block of 10 among about 6: 0.17 by chance
    assert len(set(orders.values())) == 3


def test_what_fits_the_buffer_is_shuffled_as_a_whole():
    images = Stored([10] * 6, 60)
    expected = np.random.default_rng((3, 2)).permutation(60)
    assert np.array_equal(shuffled(images, 3, 2), expected)


# --- Parquet -------------------------------------------------------------------------------------

NAMES = ["cat", "dog", "ant"]


@pytest.fixture
def rows(tmp_path):
    """Twenty pictures to train on in two shards and six to evaluate on, in row groups of three."""
    images, labels = pixels(26), [number % 3 for number in range(26)]
    contents = [png(image) for image in images]
    for name, part in (
        ("train-00000-of-00002-a1b2", slice(0, 11)),
        ("train-00001-of-00002-c3d4", slice(11, 20)),
        ("validation-00000-of-00001", slice(20, 26)),
    ):
        path = tmp_path / "data" / f"{name}.parquet"
        write_parquet(path, contents[part], labels[part], names=NAMES)
    return tmp_path, images, labels


def test_parquet_is_read_without_loss(rows):
    root, images, labels = rows
    data = parquet(root=str(root), **SMALL)
    assert list(data.classes) == NAMES
    assert data.faults.lines() == []
    assert_same(data.train, expected_of(images[:20], labels[:20]))
    assert_same(data.test, expected_of(images[20:], labels[20:]))


def test_row_groups_are_read_once_an_epoch_and_few_are_kept(rows, monkeypatch):
    root, images, labels = rows
    train = parquet(root=str(root), buffer=4, **SMALL).train
    read, kept, own = [], [], train.stored._read
    monkeypatch.setattr(train.stored, "_read", lambda group: read.append(group) or own(group))
    for batch in training_batches(train, 2, 0, 1):
        kept.append(sum(map(len, train.stored._kept.values())))
        for image, index in zip(batch.images, batch.index, strict=True):
            whole = expected_of(images[:20], labels[:20]).read(index[None], (0, 1))
            assert torch.equal(image, whole[0])
    assert sorted(read) == list(range(7))
    assert max(kept) <= 2 * 4 + 3
    assert (
        list(training_batches(train, 2, 0, 1))[3].index.tolist()
        == [batch.index.tolist() for batch in training_batches(train, 2, 0, 1)][3]
    )


def test_a_part_of_the_rows_keeps_its_row_groups(rows):
    data = parquet(root=str(rows[0]), buffer=4, **SMALL)
    limited = data.with_limit(9).train
    assert np.array_equal(limited.blocks.of, data.train.blocks.of[limited.index.numpy()])
    assert len(list(training_batches(limited, 3, 0, 1))) == 3


def test_rows_can_be_sent_to_another_process(rows):
    train = parquet(root=str(rows[0]), **SMALL).train
    whole = read_all(train)
    assert torch.equal(read_all(pickle.loads(pickle.dumps(train))), whole)


@pytest.mark.parametrize(
    "name", ["{}/0000.parquet", "plain/{}/part.parquet", "{}.parquet", "my_{}_set.parquet"]
)
def test_splits_are_told_by_names_or_folders(tmp_path, name):
    for number, part in enumerate(("train", "test")):
        write_parquet(tmp_path / name.format(part), [png(pixels(1, 4, number)[0])], [0])
    data = parquet(root=str(tmp_path), size=4, padding=0)
    assert data.test.stored.name(0) == f"{tmp_path / name.format('test')}, row 0"
    assert torch.equal(read_all(data.train), read_all(expected_of(pixels(1, 4), [0])))


def test_validation_comes_before_test(rows):
    root, _, _ = rows
    write_parquet(root / "data" / "test-00000-of-00001.parquet", [b""], [-1], names=NAMES)
    assert len(parquet(root=str(root)).test.target) == 6


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_missing_split_is_named(rows, part):
    for path in (rows[0] / "data").glob(f"{part}-*"):
        path.unlink()
    wanted = {
        "train": "train on: .* contains train",
        "validation": "evaluate on: .* contains validation, val",
    }
    with pytest.raises(FileNotFoundError, match=f"has no shard to {wanted[part]}"):
        parquet(root=str(rows[0]))


def test_bytes_alone_are_pictures_too_and_names_are_labels(tmp_path):
    contents = [png(image) for image in pixels(3)]
    for part, labels in (("train", ["b", "a", "b"]), ("test", ["a", "a", "b"])):
        table = pa.table({"picture": contents, "kind": labels})
        files.write_table(table, tmp_path / f"{part}.parquet")
    data = parquet(root=str(tmp_path), image="picture", label="kind", **SMALL)
    assert list(data.classes) == ["a", "b"]
    assert_same(data.train, expected_of(pixels(3), [1, 0, 1]))


def test_a_class_that_is_only_judged_by_is_named(tmp_path):
    for part, labels in (("train", ["a"]), ("test", ["b"])):
        write_parquet(tmp_path / f"{part}.parquet", [png(pixels(1)[0])], labels)
    with pytest.raises(ValueError, match="there are no training pictures of b"):
        parquet(root=str(tmp_path))


def test_a_class_without_a_training_picture_is_told(rows):
    root, _, _ = rows
    for path in sorted((root / "data").iterdir()):
        write_parquet(path, [png(pixels(1)[0])] * 2, [0, 1], names=NAMES)
    assert parquet(root=str(root)).faults.lines() == ["1 class has no training picture: ant"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "foto"}, r"columns image, label, id; set data.image .* \(got foto\)"),
        ({"label": "kind"}, r"columns image, label, id; set data.label .* \(got kind\)"),
    ],
)
def test_columns_that_are_not_there_are_named(rows, change, message):
    with pytest.raises(ValueError, match=message):
        parquet(root=str(rows[0]), **change)


def test_columns_that_could_be_meant_are_named(tmp_path):
    table = pa.table({"image": [png(pixels(1)[0])], "fine": [0], "coarse": [0]})
    kinds = {name: {"_type": "ClassLabel", "names": ["a"]} for name in ("fine", "coarse")}
    about = json.dumps({"info": {"features": kinds}})
    for part in ("train", "test"):
        described = table.replace_schema_metadata({"huggingface": about})
        files.write_table(described, tmp_path / f"{part}.parquet")
    with pytest.raises(ValueError, match=r"set data.label .* \(got fine, coarse\)"):
        parquet(root=str(tmp_path))
    assert list(parquet(root=str(tmp_path), label="fine").classes) == ["a"]


def second(root):
    return root / "data" / "train-00001-of-00002-c3d4.parquet"


def test_a_shard_with_other_columns_is_named(rows):
    write_parquet(second(rows[0]), [png(pixels(1)[0])], [0], label="kind")
    with pytest.raises(ValueError, match=r"00001.* has the columns image, kind, id; the first"):
        parquet(root=str(rows[0]))


def test_a_shard_with_classes_in_another_order_is_named(rows):
    write_parquet(second(rows[0]), [png(pixels(1)[0])], [0], names=NAMES[::-1])
    with pytest.raises(ValueError, match=r"00001.* has other classes than .*00000"):
        parquet(root=str(rows[0]))


@pytest.mark.parametrize("label", [None, 1.5, True])
def test_labels_that_are_none_are_named(rows, label):
    write_parquet(second(rows[0]), [png(pixels(1)[0])] * 2, [label, label], names=NAMES)
    with pytest.raises(ValueError, match=r"00001.*, row 0: expected a whole number or a name"):
        parquet(root=str(rows[0]), image="image", label="label")


def test_a_label_beyond_the_names_is_named(rows):
    write_parquet(second(rows[0]), [png(pixels(1)[0])] * 2, [2, 3], names=NAMES)
    message = r"00001.*, row 1: expected a label from 0 to 2, as there are 3 names .*; got 3$"
    with pytest.raises(ValueError, match=message):
        parquet(root=str(rows[0]))


def from_rows(root, labels):
    dtype = pa.uint64() if max(labels) >= 2**63 else pa.int64()
    for part in ("train", "test"):
        write_parquet(
            root / f"{part}.parquet", [png(pixels(1)[0])] * len(labels), pa.array(labels, dtype)
        )
    return parquet(root=str(root))


def from_tars(root, labels):
    for part in ("train", "test"):
        write_tar(root / f"{part}.tar", [png(pixels(1)[0])] * len(labels), labels)
    return webdataset(root=str(root))


def from_samples(root, labels):
    return from_dataset([(None, label) for label in labels], [(None, 0)])


WITHOUT_NAMES = {
    from_rows: r"train.parquet, row 1",
    from_tars: r"train.tar: 000001.png",
    from_samples: r"train list\[1\]",
}


@pytest.mark.parametrize("label", [10**9, -1, 100_000, 2**64 - 1])
@pytest.mark.parametrize("read", WITHOUT_NAMES)
def test_a_label_far_beyond_all_pictures_is_named(tmp_path, read, label):
    message = rf"{WITHOUT_NAMES[read]}: expected a label from 0 to 99999, as the classes have no "
    with pytest.raises(ValueError, match=rf"{message}names and .* 2 training .*; got {label}$"):
        read(tmp_path, [0, label])


@pytest.mark.parametrize("read", [from_rows, from_tars])
def test_labels_of_a_few_pictures_of_many_classes_are_right(tmp_path, read):
    data = read(tmp_path, [21_840, 3])
    assert len(data.classes) == 21_841
    assert data.train.target.tolist() == [21_840, 3]


def test_a_label_that_is_only_judged_by_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(pixels(1)[0])] * 2, [0, 1])
    write_parquet(tmp_path / "test.parquet", [png(pixels(1)[0])] * 2, [0, 2])
    message = r"test.parquet, row 1: expected a label from 0 to 1, as there are 2 classes .* got 2$"
    with pytest.raises(ValueError, match=message):
        parquet(root=str(tmp_path))


def test_more_rows_than_bytes_are_refused(tmp_path):
    rows = pa.array(np.zeros(1_000_000, np.int8))
    table = pa.table({"image": pa.repeat(pa.scalar(b""), len(rows)), "label": rows})
    for part in ("train", "test"):
        files.write_table(table, tmp_path / f"{part}.parquet")
    with pytest.raises(ValueError, match=r"parquet has .* bytes and declares 1,000,000 rows of"):
        parquet(root=str(tmp_path))


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_column_that_would_grow_is_refused(tmp_path, monkeypatch, column):
    monkeypatch.setattr(sys.modules["topkd.data.sources.parquet"], "ALWAYS", 1 << 20)
    table = pa.table({"image": [png(pixels(1)[0])] * 2, "label": ["a", "b"]})
    long = [bytes(1 << 22)] * 2 if column == "image" else ["a" * (1 << 22)] * 2
    table = table.set_column(table.column_names.index(column), column, [long])
    for part in ("train", "test"):
        path = tmp_path / f"{part}.parquet"
        files.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=rf"and its {column} would unpack to 8,\d+,\d+ or more"):
        parquet(root=str(tmp_path)).train.read(torch.arange(1), None)


@pytest.mark.parametrize("nested", [True, False])
def test_a_picture_that_is_stored_once_for_many_rows_is_refused(tmp_path, monkeypatch, nested):
    monkeypatch.setattr(sys.modules["topkd.data.sources.parquet"], "ALWAYS", 1 << 20)
    places = pa.array(np.zeros(20_000, np.int32))
    once = np.random.default_rng(0).bytes(100_000)
    image = pa.DictionaryArray.from_arrays(places, pa.array([once]))
    image = pa.StructArray.from_arrays([image], ["bytes"]) if nested else image
    table = pa.table({"image": image, "label": [0] * 20_000})
    for part in ("train", "test"):  # two gigabytes, should all be read
        path = tmp_path / f"{part}.parquet"
        files.write_table(table, path, store_schema=False, dictionary_pagesize_limit=1 << 20)
    data = parquet(root=str(tmp_path))
    with pytest.raises(ValueError, match=r"train.parquet has .* its image would unpack to"):
        data.train.read(torch.arange(1), None)


def test_a_name_that_is_stored_once_for_many_rows_is_read_once(tmp_path):
    names = pa.array(["a" * 1_000_000, "b"])
    label = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 2000, pa.int32()), names)
    table = pa.table({"image": [png(pixels(1)[0])] * 4000, "label": label})
    for part in ("train", "test"):
        path = tmp_path / f"{part}.parquet"
        files.write_table(table, path, store_schema=False, dictionary_pagesize_limit=1 << 22)
    assert parquet(root=str(tmp_path)).train.target.tolist() == [0, 1] * 2000


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "its Hugging Face metadata are damaged"),
        ("[]", "its Hugging Face metadata are damaged"),
        ("[" * 100_000, "its Hugging Face metadata are damaged"),
        ('{"info": {"features": 1}}', "its Hugging Face metadata are damaged"),
        (
            '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 1}}}}',
            "expected a list of names of label, got 1",
        ),
    ],
    ids=range(5),
)
def test_damaged_metadata_are_named(rows, about, message):
    path = next(rows[0].rglob("train-*.parquet"))
    table = files.read_table(path).replace_schema_metadata({"huggingface": about})
    files.write_table(table, path)
    with pytest.raises(ValueError, match=rf"{path.name}: {message}"):
        parquet(root=str(rows[0]))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_corrupt_file_is_named(rows, share):
    content = second(rows[0]).read_bytes()
    second(rows[0]).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"00001.* is not a readable parquet file"):
        parquet(root=str(rows[0]))


def test_a_file_that_goes_away_stops_even_where_pictures_may_be_skipped(rows):
    data = parquet(root=str(rows[0]), on_error="skip")
    second(rows[0]).unlink()
    with pytest.raises(ValueError, match=r"00001.* can no longer be read"):
        read_all(data.train)


def test_files_without_a_row_are_named(rows):
    for path in (rows[0] / "data").glob("train-*"):
        files.write_table(files.read_table(path).slice(0, 0), path)
    with pytest.raises(ValueError, match="the parquet files contain no picture"):
        parquet(root=str(rows[0]))


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_corrupt_row_is_named_or_replaced(rows, content):
    root, images, _ = rows
    contents, labels = [png(image) for image in images[11:20]], [0] * 9
    contents[4] = content
    write_parquet(second(root), contents, labels, names=NAMES)
    with pytest.raises(ValueError, match=r"00001.*, row 4: not a readable image: it"):
        read_all(parquet(root=str(root), **SMALL).train)
    data = parquet(root=str(root), on_error="skip", **SMALL)
    found = read_all(data.train)
    assert torch.equal(found[15], found[16])
    assert len(data.faults.unreadable) == 1


# --- Numbered shards -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["a-00000-of-00002.parquet", "a-00001-of-00002.parquet"],
        ["a-00000-of-00002-xy1.parquet", "a-00001-of-00002-zw22.parquet"],
        ["a-0.tar", "a-1.tar", "b-7.tar"],
        [f"a-{number:03}.tar" for number in range(1, 12)],
        ["a-2021.tar", "a-2024.tar"],  # years do not count shards
        ["train/0000.parquet"],
        ["train.tar"],
        [],
    ],
)
def test_whole_sets_of_shards(names):
    refuse_gaps(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a-00000-of-00002.parquet"], r"a-00001-of-00002\* is missing: there are a-00000-of"),
        (["a-00001-of-00002-h.parquet"], r"^a-00000-of-00002\* is missing"),
        (["x/a-0.tar", "x/a-3.tar"], r"^x/a-1.tar is missing, and 1 more: .* to x/a-3.tar$"),
        ([f"a-{n:03}.tar" for n in range(1, 12) if n != 9], r"^a-009.tar is missing:"),
    ],
)
def test_sets_with_gaps(names, message):
    with pytest.raises(FileNotFoundError, match=message):
        refuse_gaps(names)


# --- Tar shards ----------------------------------------------------------------------------------


@pytest.fixture
def tars(tmp_path):
    """Twenty pictures to train on in five shards and six to evaluate on in one."""
    images, labels = pixels(26), [number % 3 for number in range(26)]
    contents = [png(image) for image in images]
    for shard in range(5):
        rows = slice(4 * shard, 4 * shard + 4)
        write_tar(tmp_path / f"set-train-{shard:03}.tar", contents[rows], labels[rows])
    write_tar(tmp_path / "set-val-000.tar", contents[20:], labels[20:])
    return tmp_path, images, labels


@pytest.mark.parametrize(
    "options",
    [{}, {"train": "set-train-{000..004}.tar", "test": "set-val-{000..000}.tar"}],
    ids=["found", "told"],
)
def test_tar_shards_are_read_without_loss(tars, options):
    root, images, labels = tars
    data = webdataset(root=str(root), **options, **SMALL)
    assert list(data.classes) == ["0", "1", "2"]
    assert_same(data.train, expected_of(images[:20], labels[:20]))
    assert_same(data.test, expected_of(images[20:], labels[20:]))
    assert data.train.blocks is None


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of that package
def test_samples_are_those_of_the_webdataset_package(tmp_path):
    # Names with folders, several dots, an extension in capitals, members that are no samples.
    contents = [png(image) for image in pixels(4)]
    members = {
        "b/x.cls": b" 1\n", "b/x.png": contents[0], "b/y.meta.json": b"{}", "b/y.PNG": contents[1],
        "b/y.cls": b"0", "a/x.png": contents[2], "a/x.cls": b"1", "README": b"about",
        "z.w/1.png": contents[3], "z.w/1.cls": b"0",
    }  # fmt: skip
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for name, content in members.items():
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    theirs = wds.WebDataset(str(tmp_path / "train.tar"), shardshuffle=False).decode("rgb8")
    theirs = list(theirs.to_tuple("png", "cls"))
    data = webdataset(root=str(tmp_path), **SMALL)
    assert data.train.target.tolist() == [label for _, label in theirs]
    expected = expected_of(np.stack([image for image, _ in theirs]), data.train.target.tolist())
    assert_same(data.train, expected)
    assert data.train.stored.name(1) == f"{tmp_path / 'train.tar'}: b/y.PNG"


def test_labels_may_be_names_or_stand_in_json(tmp_path):
    contents = [png(image) for image in pixels(3)]
    for part in ("train", "test"):
        write_tar(tmp_path / "names" / f"{part}.tar", contents, ["b", "a", "b"], label="txt")
        numbers = [json.dumps({"label": label}) for label in (1, 0, 1)]
        write_tar(tmp_path / "json" / f"{part}.tar", contents, numbers, label="json")
    (tmp_path / "classes.txt").write_text("a\nb\n", encoding="utf-8")
    named = webdataset(root=str(tmp_path / "names"), label="txt")
    counted = webdataset(
        root=str(tmp_path / "json"), label="json:label", classes=str(tmp_path / "classes.txt")
    )
    for data in (named, counted):
        assert list(data.classes) == ["a", "b"]
        assert data.train.target.tolist() == [1, 0, 1]


@pytest.fixture
def fetched(monkeypatch):
    """Counts what the webdataset package is asked for."""
    seen, own = [], wds.gopen
    monkeypatch.setattr(wds, "gopen", lambda shard: seen.append(shard) or own(shard))
    return seen


def elsewhere(root):
    return {
        "train": f"pipe:cat {root}/set-train-{{000..004}}.tar",
        "test": f"pipe:cat {root}/set-val-000.tar",
        "cache": str(root / "cache"),
    }


def test_shards_from_elsewhere_are_fetched_once(tars, fetched):
    root, images, labels = tars
    for _ in range(2):
        data = webdataset(**elsewhere(root), **SMALL)
        assert_same(data.train, expected_of(images[:20], labels[:20]))
        assert_same(data.test, expected_of(images[20:], labels[20:]))
        assert len(fetched) == len(set(fetched)) == 6
    assert not list((root / "cache").glob(".part*"))


def test_shards_from_elsewhere_come_and_go(tars, fetched):
    root, images, labels = tars
    images = np.concatenate([pixels(80, seed=1), images[20:]])
    for shard in range(20):
        rows = slice(4 * shard, 4 * shard + 4)
        place = root / f"set-train-{shard:03}.tar"
        write_tar(place, [png(image) for image in images[rows]], [0, 1, 2, 0])
    options = elsewhere(root) | {"train": f"pipe:cat {root}/set-train-{{000..019}}.tar"}
    data = webdataset(**options, keep=4, **SMALL)
    expected = expected_of(images[:80], [0, 1, 2, 0] * 20)
    orders = []
    for epoch in (1, 2):
        fetched.clear()
        order = []
        for batch in training_batches(data.train, 8, 0, epoch):
            assert torch.equal(batch.images, expected.read(batch.index, (0, epoch)))
            assert len(list((root / "cache").glob("*.tar"))) <= 4
            order += batch.index.tolist()
        assert sorted(order) == list(range(80))
        assert len(fetched) == len(set(fetched)) >= 16  # some lay there, and none came twice
        orders.append(order)
    assert orders[0] != orders[1]
    assert torch.equal(next(plain_batches(data.test, 6)).images, read_all(data.test))
    fetched.clear()
    webdataset(**options, keep=4, **SMALL)
    assert fetched == []  # what lies where is known from the first time


def test_what_is_known_of_a_shard_is_forgotten_when_it_changes(tars):
    root, images, _ = tars
    options = {"root": str(root), "cache": str(root / "cache")}
    assert webdataset(**options).train.target[0] == 0
    write_tar(root / "set-train-000.tar", [png(images[0])], [2])
    assert webdataset(**options).train.target.tolist()[0] == 2


def test_shards_can_be_sent_to_another_process(tars):
    train = webdataset(**elsewhere(tars[0]), **SMALL).train
    whole = read_all(train)
    assert torch.equal(read_all(pickle.loads(pickle.dumps(train))), whole)


def test_a_shard_that_cannot_be_fetched_is_named(tars):
    options = elsewhere(tars[0]) | {"test": "pipe:cat /nowhere/val.tar 2>/dev/null"}
    with pytest.raises(ValueError, match="^pipe:cat /nowhere/val.tar"):
        webdataset(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": None}, "need data.cache"),
        ({"keep": 2}, "data.keep must be 3 or more, got 2"),
        ({"test": None}, "set both data.train and data.test, or neither"),
    ],
)
def test_options_that_do_not_go_together(tars, change, message):
    with pytest.raises(ValueError, match=message):
        webdataset(**elsewhere(tars[0]) | change)


@pytest.mark.parametrize("how", ["found", "told"])
def test_a_shard_that_is_lost_in_the_middle_is_named(tars, how):
    root = tars[0]
    (root / "set-train-002.tar").unlink()
    told = {"train": "set-train-{000..004}.tar", "test": "set-val-000.tar"}
    with pytest.raises(FileNotFoundError, match="set-train-002.tar is missing"):
        webdataset(root=str(root), **(told if how == "told" else {}))


def test_no_shards_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no shard to train on"):
        webdataset(root=str(tmp_path))


@pytest.mark.parametrize("cut", [0, 100, 512, 1300, 3000])
def test_a_shard_that_is_cut_off_is_named(tars, cut):
    path = tars[0] / "set-train-002.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"^\S*set-train-002.tar"):
        webdataset(root=str(tars[0]))


def test_a_compressed_shard_is_refused(tars):
    import gzip

    path = tars[0] / "set-train-002.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match="train-002.tar is not a complete, uncompressed tar file"):
        webdataset(root=str(tars[0]))


def test_a_shard_that_gets_shorter_stops_even_where_pictures_may_be_skipped(tars):
    data = webdataset(root=str(tars[0]), on_error="skip")
    path = tars[0] / "set-train-002.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="set-train-002.tar has become shorter"):
        read_all(data.train)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("c.png", b"picture"), r": c has no .cls, only .png"),
        (("c.cls", b"1"), r": c has no picture, only .cls"),
        (("000000.png", b"picture"), r"000000.png appears twice"),
    ],
)
def test_an_incomplete_sample_is_named(tmp_path, member, message):
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", [png(pixels(1)[0])], [0])
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        about = tarfile.TarInfo(member[0])
        about.size = len(member[1])
        tar.addfile(about, io.BytesIO(member[1]))
    with pytest.raises(ValueError, match=f"train.tar{message}|train.tar: {message}"):
        webdataset(root=str(tmp_path))


@pytest.mark.parametrize(
    ("label", "content", "message"),
    [
        ("cls", "", "its label is empty"),
        ("json:label", "{", "its label cannot be read"),
        ("json:label", "{}", "its label cannot be read: KeyError"),
        ("json:label", "[" * 100_000, "its label cannot be read: RecursionError"),
        ("json:label", '{"label": 1.5}', "expected a whole number or a name as label, got 1.5"),
        ("json:label", '{"label": true}', "expected a whole number or a name as label, got True"),
        ("cls", "1" * 5000, "expected a label of up to 1,000 characters, got more"),
    ],
)
def test_a_label_that_is_none_is_named(tmp_path, label, content, message):
    for part in ("train", "val"):
        where = label.partition(":")[0]
        write_tar(tmp_path / f"{part}.tar", [png(pixels(1)[0])], [content], label=where)
    with pytest.raises(ValueError, match=f"train.tar: 000000: {message}"):
        webdataset(root=str(tmp_path), label=label)


@pytest.mark.parametrize("name", ["000000.cls", "000000.png"])
def test_a_sparse_member_is_refused(tmp_path, name):
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", [png(pixels(1)[0])], [0])
    about = tarfile.TarInfo(name)
    about.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(about.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (1 << 32)  # bytes, once the holes are filled
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("000000.txt"))
        tar.fileobj.write(header)
        tar.offset += len(header)
    with pytest.raises(ValueError, match=rf"train.tar: {name} is sparse; store it as a plain file"):
        webdataset(root=str(tmp_path))


def test_a_member_longer_than_any_memory_is_refused(tmp_path):
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", [png(pixels(1)[0])], [0])
    about = tarfile.TarInfo("long name")
    about.type, about.size = tarfile.GNUTYPE_LONGNAME, 1 << 60
    (tmp_path / "train.tar").write_bytes(about.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match=r"train.tar is not a complete, uncompressed tar file"):
        webdataset(root=str(tmp_path))


def test_a_corrupt_member_is_named_or_replaced(tars):
    root, images, _ = tars
    contents = [png(images[8]), b"", png(images[10]), png(images[11])]
    write_tar(root / "set-train-002.tar", contents, [0, 0, 1, 0])
    with pytest.raises(ValueError, match=r"002.tar: 000001.png: not a readable image: it is empty"):
        read_all(webdataset(root=str(root), **SMALL).train)
    data = webdataset(root=str(root), on_error="skip", **SMALL)
    found = read_all(data.train)
    assert torch.equal(found[9], found[11])
    assert len(data.faults.unreadable) == 1


def test_without_the_package_the_line_that_installs_it_is_told(tars, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'topkd\[data\]'"):
        webdataset(root=str(tars[0]))


# --- Data sets of Python -------------------------------------------------------------------------


IMAGES, LABELS = pixels(6), [0, 1, 2, 2, 1, 0]
FORMS = {
    "PIL": Image.fromarray,
    "bytes of numpy": lambda image: image,
    "bytes of torch": lambda image: torch.from_numpy(image).permute(2, 0, 1),
    "floats": lambda image: torch.from_numpy(image).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("number", [int, np.int64, torch.tensor])
def test_samples_of_every_form(form, number):
    samples = [(form(i), number(label)) for i, label in zip(IMAGES, LABELS, strict=True)]
    data = from_dataset(samples, samples[:3], classes=["a", "b", "c"], **SMALL)
    assert data.classes == ["a", "b", "c"]
    assert_same(data.train, expected_of(IMAGES, LABELS))
    assert_same(data.test, expected_of(IMAGES[:3], LABELS[:3]))


def test_gray_tensors_become_color():
    gray = IMAGES[:1, ..., :1]
    samples = [(torch.from_numpy(gray[0]).permute(2, 0, 1), 0)]
    data = from_dataset(samples, samples, **SMALL)
    assert torch.equal(read_all(data.train), read_all(expected_of(gray.repeat(3, -1), [0])))


class WithTargets(torch.utils.data.Dataset):
    """Tells its labels and classes, as those of torchvision do."""

    def __init__(self, attribute="targets"):
        setattr(self, attribute, torch.tensor(LABELS))
        self.classes, self.asked = ["a", "b", "c"], []

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.asked.append(index)
        return Image.fromarray(IMAGES[index]), LABELS[index]


@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_labels_that_are_told_need_no_picture(attribute):
    whole = WithTargets(attribute)
    part = torch.utils.data.Subset(whole, [4, 0])
    data = from_dataset(whole, part, **SMALL)
    assert whole.asked == []
    assert data.classes == ["a", "b", "c"]
    assert data.test.target.tolist() == [1, 0]
    assert_same(data.test, expected_of(IMAGES[[4, 0]], [1, 0]))


def test_targets_are_not_trusted_where_they_are_changed():
    dataset = WithTargets()
    dataset.target_transform = lambda label: label
    dataset.targets = [9] * 6
    assert from_dataset(dataset, dataset).train.target.tolist() == LABELS


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 4, 4), 1.5), r"train list\[0\]: floats must be in \[0, 1\], got 1.5 to"),
        (torch.full((3, 4, 4), float("nan")), r"floats must be in \[0, 1\], got nan"),
        (torch.zeros(4, 4), r"or a tensor \(3, h, w\), got Tensor \(4, 4\)"),
        (np.zeros((4, 4, 3)), r"got ndarray \(4, 4, 3\)"),
        ("path.png", r"got str \(\)"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_samples_that_are_no_pictures_stop_in_any_case(image, message, on_error):
    data = from_dataset([(image, 0)], [(image, 0)], on_error=on_error)
    with pytest.raises(ValueError, match=message):
        read_all(data.train)


@pytest.mark.parametrize(
    "label", ["cat", 1.5, None, True, np.bool_(True), torch.tensor(True), torch.tensor(1.0)]
)
def test_labels_of_samples_that_are_no_numbers_are_named(label):
    with pytest.raises(ValueError, match=r"train list\[1\]: expected a whole number as label, got"):
        from_dataset([(None, 0), (None, label)], [(None, 0)])


def test_data_sets_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="test list is empty"):
        from_dataset([(None, 0)], [])
    wrong = WithTargets()
    wrong.targets = [0]
    with pytest.raises(ValueError, match="train WithTargets has 6 samples and 1 labels"):
        from_dataset(wrong, wrong)
    with pytest.raises(
        ValueError, match=r"train list\[1\]: expected a label from 0 to 1, .* got 2$"
    ):
        from_dataset([(None, 0), (None, 2)], [(None, 0)], classes=["a", "b"])


def test_a_sample_that_cannot_be_read_is_replaced_where_told():
    class Damaged(WithTargets):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("image file is truncated")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match=r"train Damaged\[1\]: not a readable .* is truncated"):
        read_all(from_dataset(Damaged(), WithTargets()).train)
    data = from_dataset(Damaged(), WithTargets(), on_error="skip", **SMALL)
    found = read_all(data.train)
    assert torch.equal(found[1], found[4])
    assert list(data.faults.unreadable) == ["train Damaged[1]"]


@pytest.fixture
def mine(monkeypatch):
    module = types.ModuleType("mine")
    module.train = module.test = WithTargets
    module.broken = lambda: {}.missing
    monkeypatch.setitem(sys.modules, "mine", module)


def test_functions_of_a_module_give_data_sets(mine):
    data = load_data(DataSection(name="dataset", train="mine:train", test="mine:test", **SMALL))
    assert_same(data.train, expected_of(IMAGES, LABELS))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "data.train: expected module:function, got 'mine'"),
        ("absent.one:train", "data.train: there is no module 'absent.one'"),
        ("mine:absent", "data.train: mine has no 'absent'"),
    ],
)
def test_functions_that_are_not_there_are_named(mine, name, message):
    with pytest.raises(ValueError, match=message):
        DATA["dataset"](train=name, test="mine:test")


def test_an_error_inside_such_a_function_is_its_own(mine):
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'missing'"):
        DATA["dataset"](train="mine:broken", test="mine:test")


# --- In recipes ----------------------------------------------------------------------------------


def test_options_of_a_source_come_from_the_recipe(rows):
    tree = {"name": "parquet", "root": str(rows[0]), "size": 8, "mean": [0.5, 0.5, 0.5]}
    data = load_data(DataSection.model_validate(tree | {"on_error": "skip"}))
    assert isinstance(data, Data)
    assert tuple(data.mean) == (0.5,) * 3
    assert data.train.on_error == "skip"
    assert data.test.on_error == "stop"
    assert read_all(data.test).shape == (6, 3, 8, 8)
    with pytest.raises(RecipeError, match="data.on_error"):
        load_data(DataSection.model_validate(tree | {"on_error": "ignore"}))


@pytest.mark.parametrize("source", ["parquet", "webdataset"])
def test_batches_are_full_whatever_the_storage(source, rows, tars):
    data = DATA[source](root=str(rows[0]), **SMALL)
    sizes = {len(batch.index) for batch in training_batches(data.train, 3, 0, 1)}
    assert sizes == {3}
    parts = [
        [batch.index.tolist() for batch in training_batches(data.train, 3, 0, 1, rank=r, ranks=2)]
        for r in (0, 1)
    ]
    flat = list(itertools.chain(*itertools.chain(*parts)))
    assert len(set(flat)) == len(flat) == 18
