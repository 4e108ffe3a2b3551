"""Images: where they come from, what is refused, and what augmentation does to each."""

import io
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reference import data as reference
from scipy import stats
from torchvision.transforms import functional as torchvision

from topkd.data import DATA, Data, InMemory, plain_batches, same_order, training_batches
from topkd.data.augment import crop_and_flip, draws, normalize
from topkd.data.pictures import MEAN, STD, CropConfig, Names, Pictures, open_bytes
from topkd.data.sources.cifar import cifar10, cifar100
from topkd.data.sources.digits import digits
from topkd.data.sources.folder import Files, folder

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

HALF = ((0.5,) * 3, (0.25,) * 3)


def pixels(count, height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def in_memory(count=20, size=8, classes=4, padding=2, flip=True):
    target = torch.arange(count) % classes
    return InMemory(torch.from_numpy(pixels(count, size, size)), target, *HALF, padding, flip)


# --- Random numbers ------------------------------------------------------------------------------


def test_the_hash_is_splitmix64():
    # The first outputs for the seed 1234567 that Vigna publishes with his implementation.
    gamma, published = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973]
    assert [reference.splitmix(1234567 + i * gamma) for i in (0, 1)] == published


@given(
    st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.lists(st.integers(0, 10**7), max_size=4)
)
def test_draws_are_the_hash_in_whole_numbers(seed, epoch, index):
    found = draws(seed, epoch, torch.tensor(index, dtype=torch.long), 3)
    expected = [[reference.draw(seed, epoch, i, number) for number in range(3)] for i in index]
    assert found.dtype == torch.float64
    assert found.tolist() == expected


STREAMS = {
    "along the index": lambda n: draws(0, 1, torch.arange(n), 1)[:, 0],
    "another seed": lambda n: draws(12345, 1, torch.arange(n), 1)[:, 0],
    "another epoch": lambda n: draws(0, 200, torch.arange(n), 1)[:, 0],
    "another number": lambda n: draws(0, 1, torch.arange(n), 5)[:, 4],
    "along the epochs": lambda n: torch.cat(
        [draws(0, e, torch.tensor([7]), 1)[0] for e in range(n)]
    ),
    "along the seeds": lambda n: torch.cat(
        [draws(s, 1, torch.tensor([7]), 1)[0] for s in range(n)]
    ),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_draws_are_uniform(stream):
    found = stream(2000)
    assert ((found >= 0) & (found < 1)).all()
    assert stats.kstest(found, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("first", STREAMS)
@pytest.mark.parametrize("second", STREAMS)
def test_draws_of_different_streams_are_unrelated(first, second):
    a, b = STREAMS[first](1000)[:-1], STREAMS[second](1000)[1:]
    assert stats.pearsonr(a, b).pvalue > 1e-4
    if first != second:
        assert not torch.equal(a, b)


# --- Augmentation --------------------------------------------------------------------------------


@given(st.integers(0, 3), st.booleans(), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_crop_and_flip_is_one_pixel_at_a_time(padding, flip, height, width, seed):
    images, uniform = torch.from_numpy(pixels(5, height, width, seed)), torch.rand(5, 3).double()
    found = crop_and_flip(images, uniform, padding=padding, flip=flip)
    for image, numbers, result in zip(images, uniform, found, strict=True):
        expected = reference.crop_and_flip(image.tolist(), numbers.tolist(), padding, flip)
        assert result.tolist() == expected


@pytest.mark.parametrize("number", [0.0, math.nextafter(1, 0)])
def test_the_farthest_crops_stay_inside_the_border(number):
    images = torch.from_numpy(pixels(1, 4, 4))
    uniform = torch.tensor([[number, number, 0.9]], dtype=torch.float64)
    moved = crop_and_flip(images, uniform, padding=1, flip=True)
    if number == 0:
        assert torch.equal(moved[:, 1:, 1:], images[:, :-1, :-1])
        assert (moved[:, 0] == 0).all()
        assert (moved[:, :, 0] == 0).all()
    else:
        assert torch.equal(moved[:, :-1, :-1], images[:, 1:, 1:])
        assert (moved[:, -1] == 0).all()
        assert (moved[:, :, -1] == 0).all()


def test_the_given_images_are_never_changed():
    images = torch.from_numpy(pixels(5, 4, 4))
    before = images.clone()
    crop_and_flip(images, torch.rand(5, 3).double(), padding=2, flip=True)
    normalize(images, *HALF)
    assert torch.equal(images, before)


def test_images_of_any_layout_are_augmented_alike():
    images, uniform = torch.from_numpy(pixels(5, 6, 4)), torch.rand(5, 3).double()
    turned = images.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    for function in (
        lambda x: crop_and_flip(x, uniform, padding=1, flip=True),
        lambda x: normalize(x, *HALF),
    ):
        assert torch.equal(function(turned), function(images))


def test_normalize_is_that_of_torchvision():
    images, mean, std = torch.from_numpy(pixels(5, 6, 7)), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = torchvision.normalize(images.permute(0, 3, 1, 2).float() / 255, mean, std)
    found = normalize(images, mean, std)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.is_contiguous()  # so that any network may see them


def test_plain_images_are_only_normalized():
    images = in_memory()
    expected = normalize(images.pixels[3:6], *HALF)
    assert torch.equal(images.read(torch.arange(3, 6), None), expected)


def test_augmented_images_are_cropped_and_flipped_by_their_draws():
    images, index = in_memory(), torch.tensor([4, 0, 11])
    found = images.read(index, augmented=(3, 2))
    for place, i in enumerate(index.tolist()):
        numbers = [reference.draw(3, 2, i, number) for number in range(3)]
        cropped = reference.crop_and_flip(images.pixels[i].tolist(), numbers, 2, True)
        expected = normalize(torch.tensor([cropped], dtype=torch.uint8), *HALF)[0]
        assert torch.equal(found[place], expected)


@pytest.mark.parametrize("part", ["alone", "among others"])
def test_augmentation_does_not_depend_on_the_rest_of_the_batch(part):
    images = in_memory()
    together = images.read(torch.arange(20), augmented=(0, 1))
    index = torch.tensor([7]) if part == "alone" else torch.tensor([19, 3, 7, 7])
    assert torch.equal(images.read(index, augmented=(0, 1)), together[index])


def test_augmentation_differs_between_epochs_and_seeds():
    images, index = in_memory(), torch.arange(20)
    first, *others = (images.read(index, augmented=key) for key in ((0, 1), (0, 2), (1, 1)))
    for other in others:
        same = (first == other).flatten(1).all(1)
        assert same.float().mean() < 0.3  # 50 outcomes each


def test_about_half_of_the_images_are_mirrored_and_every_crop_occurs():
    gray = np.broadcast_to(np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1), (4000, 3, 3, 3))
    images = InMemory(torch.tensor(gray), torch.zeros(4000).long(), *HALF, padding=1, flip=True)
    middle = images.read(torch.arange(4000), (0, 1))[:, 0, 1, 1]
    # The middle pixel is the one the crop is centered at: nine places, all as likely.
    counts = torch.unique(middle, return_counts=True)[1]
    assert len(counts) == 9
    assert stats.chisquare(counts).pvalue > 1e-3
    unmoved = images.read(torch.arange(4000), (0, 1))[:, 0, 1]
    row = normalize(torch.tensor(gray[:1]), *HALF)[0, 0, 1]
    kept = (unmoved == row).all(1).sum().item()
    mirrored = (unmoved == row.flip(0)).all(1).sum().item()
    assert stats.binomtest(mirrored, kept + mirrored).pvalue > 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(4, 8, 8, 3), r"pixels must be bytes .* got torch.float32 \(4, 8, 8, 3\)"),
        (torch.zeros(4, 3, 8, 8).byte(), r"pixels must be bytes .* got torch.uint8 \(4, 3, 8, 8\)"),
        (torch.zeros(4, 8, 8).byte(), r"pixels must be bytes .* got torch.uint8 \(4, 8, 8\)"),
        (torch.zeros(5, 8, 8, 3).byte(), "5 images need as many labels, got 4"),
    ],
)
def test_pixels_that_are_no_images_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        InMemory(wrong, torch.zeros(4).long(), *HALF, padding=1, flip=False)


# --- Batches -------------------------------------------------------------------------------------


def indices(*args, **options):
    return [batch.index.tolist() for batch in training_batches(*args, **options)]


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_rest():
    shown = indices(in_memory(23), 4, 0, 1)
    assert [len(index) for index in shown] == [4] * 5
    flat = sum(shown, [])
    assert len(set(flat)) == 20
    assert set(flat) <= set(range(23))


def test_a_divisible_epoch_shows_every_image():
    assert sorted(sum(indices(in_memory(20), 5, 3, 1), [])) == list(range(20))


def test_order_depends_on_seed_and_epoch_alone():
    images = in_memory(20)
    assert indices(images, 5, 0, 1) == indices(images, 5, 0, 1)
    orders = {str(indices(images, 5, seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}
    assert len(orders) == 6


def test_what_is_dropped_changes_with_the_epoch():
    dropped = {
        i
        for epoch in range(60)
        for i in set(range(7)) - set(sum(indices(in_memory(7), 3, 0, epoch), []))
    }
    assert dropped == set(range(7))


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_an_epoch(ranks):
    images = in_memory(26)
    parts = [indices(images, 4, 0, 1, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    flat = sum(sum(parts, []), [])
    assert len(set(flat)) == len(flat) == 26 // (4 * ranks) * 4 * ranks


def test_batches_carry_their_images_and_labels():
    images = in_memory(20)
    for batch in training_batches(images, 5, seed=3, epoch=2):
        assert torch.equal(batch.images, images.read(batch.index, (3, 2)))
        assert torch.equal(batch.target, batch.index % 4)


def test_plain_batches_are_all_images_in_order():
    images = in_memory(23)
    batches = list(plain_batches(images, 5))
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(23))
    assert torch.equal(
        torch.cat([batch.images for batch in batches]), images.read(torch.arange(23), None)
    )


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match="20 training images are too few for a batch of 21"):
        list(training_batches(in_memory(20), 21, 0, 1))
    with pytest.raises(ValueError, match="20 training images are too few for a batch of 22"):
        list(training_batches(in_memory(20), 11, 0, 1, ranks=2))


def test_an_epoch_that_is_left_early_leaves_no_thread_behind():
    import threading

    before = threading.active_count()
    batches = training_batches(in_memory(20), 2, 0, 1)
    next(batches)
    batches.close()
    assert threading.active_count() == before


# --- Splits --------------------------------------------------------------------------------------


def uneven():
    """20, 40 and 60 images of three classes, mixed."""
    target = torch.tensor([0] * 20 + [1] * 40 + [2] * 60)[torch.randperm(120)]
    images = InMemory(torch.from_numpy(pixels(120, 4, 4)), target, *HALF, padding=1, flip=False)
    return Data("uneven", images, in_memory(8, 4, 3), ["a", "b", "c"], *HALF)


def test_validation_split_is_stratified_and_parts_the_training_set():
    data = uneven()
    split = data.with_validation(0.25)
    assert split.eval_split == "validation"
    assert split.test.target.bincount().tolist() == [5, 10, 15]
    assert split.train.target.bincount().tolist() == [15, 30, 45]
    parts = [part.read(torch.arange(len(part.target)), None) for part in (split.train, split.test)]
    every = torch.cat(parts).flatten(1)
    whole = data.train.read(torch.arange(120), None).flatten(1)
    order = [rows.unique(dim=0) for rows in (every, whole)]
    assert torch.equal(*order)
    assert data.eval_split == "test"


def test_validation_split_is_always_the_same():
    data = uneven()
    first = data.with_validation(0.25)
    torch.manual_seed(99)
    np.random.default_rng(99)
    assert torch.equal(first.test.index, data.with_validation(0.25).test.index)


def test_a_subset_is_augmented_as_in_the_whole():
    data = uneven()
    part = data.with_validation(0.25).train
    index = torch.arange(5)
    assert torch.equal(part.read(index, (0, 1)), data.train.read(part.index[index], (0, 1)))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_split_that_leaves_a_class_without_images_is_refused(share):
    with pytest.raises(ValueError, match=f"share of {share} leaves a class without images"):
        uneven().with_validation(share)


@pytest.mark.parametrize(("limit", "expected"), [(60, [10, 20, 30]), (12, [2, 4, 6])])
def test_limit_keeps_the_shares_of_the_classes(limit, expected):
    limited = uneven().with_limit(limit)
    assert limited.train.target.bincount().tolist() == expected
    assert limited.eval_split == "test"
    assert len(limited.test.target) == 8


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 100])
def test_a_limit_is_the_number_of_images(limit):
    assert len(uneven().with_limit(limit).train.target) == limit


def test_a_limit_above_the_number_keeps_all():
    assert len(uneven().with_limit(10**6).train.target) == 120


@pytest.mark.parametrize("part", ["training", "test"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_named(part, label):
    good = in_memory(8, 4, 3)
    target = good.target.clone()
    target[5] = label
    bad = InMemory(good.pixels, target, *HALF, padding=1, flip=False)
    train, test = (bad, good) if part == "training" else (good, bad)
    message = rf"some: {part} image 5 has label {label}, but there are 3 classes \(0 to 2\)"
    with pytest.raises(ValueError, match=message):
        Data("some", train, test, ["a", "b", "c"], *HALF)


# --- Classes and teachers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "teacher"),
    [
        (["a", "b"], ["a", "b"]),
        (["0", "1"], ["a", "b"]),  # one side only counts
        (["a", "b"], ["0", "1"]),
        (("a",), ["a"]),
    ],
)
def test_classes_that_agree(data, teacher):
    same_order(data, teacher)


@pytest.mark.parametrize(
    ("data", "teacher", "message"),
    [
        (["a", "b"], ["a"], "^the data have 2 classes, but resnet.pt has 1$"),
        (["0", "1"], ["0"], "^the data have 2 classes, but resnet.pt has 1$"),
        (["a", "b", "c"], ["a", "x", "y"], "^class 1 is 'b' in the data and 'x' for resnet.pt$"),
        (["b", "a"], ["a", "b"], "class 0 is 'b' .* 'a' for resnet.pt: the same names in another"),
        (["1", "0"], ["0", "2"], "class 0 is '1'"),
    ],
)
def test_classes_that_differ(data, teacher, message):
    if data == ["1", "0"]:
        teacher = ["2", "0"]
    with pytest.raises(ValueError, match=message):
        same_order(data, teacher, "resnet.pt")


# --- Digits --------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data, bunch = digits(), load_digits()
    assert (len(data.train.target), len(data.test.target)) == (1257, 540)
    rows = []
    for part in (data.train, data.test):
        gray = part.pixels[..., 0].double() * 16 / 255  # from bytes back to 0 ... 16
        assert torch.equal(part.pixels[..., 0], part.pixels[..., 1])
        assert torch.equal(part.pixels[..., 0], part.pixels[..., 2])
        rows += [
            (*g.round().flatten().tolist(), t)
            for g, t in zip(gray, part.target.tolist(), strict=True)
        ]
    whole = [(*x, t) for x, t in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True)]
    assert sorted(rows) == sorted(whole)


def test_digits_have_zero_mean_and_unit_variance_in_training():
    data = digits()
    images = data.train.read(torch.arange(1257), None)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_digits_are_stratified_and_always_the_same():
    data, again = digits(), digits()
    assert torch.equal(data.train.pixels, again.train.pixels)
    shares = [part.target.bincount() / len(part.target) for part in (data.train, data.test)]
    assert (shares[0] - shares[1]).abs().max() < 0.003


# --- CIFAR ---------------------------------------------------------------------------------------


def png(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def write_shard(path, images, labels, *, image="img", label="fine_label", names=None):
    """One file of the Hugging Face layout; images are arrays, or bytes as they are."""
    rows = [{"bytes": i if isinstance(i, bytes | None) else png(i), "path": None} for i in images]
    table = pa.table({image: rows, label: labels})
    if names is not None:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


@pytest.fixture
def small_cifar(tmp_path):
    """Three shards in the layout of CIFAR-100, and what they hold."""
    images, labels = pixels(7), [5, 99, 0, 5, 42, 7, 8]
    names = [f"class {c}" for c in range(100)]
    write_shard(tmp_path / "train-00000-of-00002.parquet", images[:3], labels[:3], names=names)
    write_shard(tmp_path / "train-00001-of-00002.parquet", images[3:5], labels[3:5], names=names)
    write_shard(
        tmp_path / "data" / "test-00000-of-00001.parquet", images[5:], labels[5:], names=names
    )
    return tmp_path, images, labels


def test_cifar_is_read_from_parquet_without_loss(small_cifar):
    root, images, labels = small_cifar
    data = cifar100(root=str(root))
    assert np.array_equal(data.train.pixels, images[:5])
    assert np.array_equal(data.test.pixels, images[5:])
    assert data.train.target.tolist() == labels[:5]
    assert data.test.target.tolist() == labels[5:]
    assert list(data.classes) == [f"class {c}" for c in range(100)]
    expected = torchvision.normalize(
        torch.from_numpy(images[5:]).permute(0, 3, 1, 2) / 255,
        (0.5071, 0.4867, 0.4408),  # of the public benchmark
        (0.2675, 0.2565, 0.2761),
    )
    torch.testing.assert_close(data.test.read(torch.arange(2), None), expected)


def test_cifar_is_cropped_from_a_border_of_four_and_mirrored(small_cifar):
    train = cifar100(root=str(small_cifar[0])).train
    assert (train.padding, train.flip) == (4, True)


@pytest.mark.parametrize("image", ["img", "image"])
def test_cifar10_and_either_name_of_the_image_column(tmp_path, image):
    for part in ("train", "test"):
        path = tmp_path / f"{part}-0.parquet"
        write_shard(path, pixels(2), [3, 9], image=image, label="label")
    data = cifar10(root=str(tmp_path))
    assert data.test.target.tolist() == [3, 9]
    assert list(data.classes) == [str(c) for c in range(10)]


def test_a_home_folder_is_understood(small_cifar, monkeypatch):
    root, _, _ = small_cifar
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(cifar100(root=f"~/{root.name}").train.target) == 5


def test_missing_folder_says_what_is_wanted(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"absent contains neither parquet .* data.root .* data.download"
    ):
        cifar100(root=str(tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()


def test_damaged_files_of_torchvision_are_not_read(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match="nor all files of torchvision's cifar-100-python"):
        cifar100(root=str(tmp_path))


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_shards_are_named(small_cifar, part):
    root, _, _ = small_cifar
    for path in root.rglob(f"{part}-*.parquet"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"has no {part}-\*.parquet; the copy is incomplete"
    ):
        cifar100(root=str(root))


@pytest.mark.parametrize("keep", [0, 10, 100, 0.5, 0.99])
def test_a_corrupt_shard_is_named(small_cifar, keep):
    root, _, _ = small_cifar
    path = root / "train-00001-of-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet is not a readable parquet"):
        cifar100(root=str(root))


def with_row(root, image, label=1):
    """Makes row 2 of the first training shard something else."""
    images = [*pixels(2), image, *pixels(1, seed=1)]
    write_shard(root / "train-00000-of-00002.parquet", images, [0, 1, label, 2])
    return str(root)


GOOD = png(pixels(1)[0])


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", None, GOOD[:50], GOOD[:-100], GOOD[:200] + b"\0" * 50 + GOOD[250:]],
    ids=["empty", "text", "null", "the start", "cut off", "damaged inside"],
)
def test_a_corrupt_image_is_named_with_its_row(small_cifar, content):
    message = "train-00000-of-00002.parquet, row 2: not a readable image"
    with pytest.raises(ValueError, match=message):
        cifar100(root=with_row(small_cifar[0], content))


class OneOf:
    """A picture of these bytes."""

    def __init__(self, content):
        self.content = content

    def name(self, index):
        return "here"

    def open(self, index):
        return open_bytes(self.content)


@given(st.data())
def test_damage_never_surprises(data):
    damaged = bytearray(GOOD)
    for place in data.draw(st.lists(st.integers(0, len(GOOD) - 1), min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        outcome = str(
            read_all(Pictures(OneOf(bytes(damaged)), torch.zeros(1), CropConfig(32))).shape
        )
    except ValueError as error:
        outcome = str(error)
    assert outcome == "torch.Size([1, 3, 32, 32])" or outcome.startswith("here: ")


def test_a_corrupt_image_is_replaced_by_the_next_of_its_class_where_told(small_cifar):
    root = with_row(small_cifar[0], b"no image", label=42)
    data = cifar100(root=root, on_error="skip")
    assert data.train.target.tolist() == [0, 1, 42, 2, 5, 42][:4] + data.train.target.tolist()[4:]
    same = (data.train.target == 42).nonzero()[:, 0].tolist()
    assert same[0] == 2
    assert torch.equal(data.train.pixels[2], data.train.pixels[same[1]])
    (line,) = data.faults.lines()
    assert line.startswith("1 unreadable picture replaced by the next of the same class: ")
    assert "train-00000-of-00002.parquet, row 2: not a readable image" in line
    assert data.faults.facts()["unreadable"]["count"] == 1


def test_a_class_without_a_readable_image_is_refused(small_cifar):
    root = with_row(small_cifar[0], b"no image", label=77)
    with pytest.raises(ValueError, match="row 2: not a readable image, nor is any other of class"):
        cifar100(root=root, on_error="skip")


def test_a_corrupt_test_image_always_stops(small_cifar):
    root, images, _ = small_cifar
    path = root / "data" / "test-00000-of-00001.parquet"
    write_shard(path, [images[0], b""], [1, 2], names=[f"class {c}" for c in range(100)])
    with pytest.raises(ValueError, match="row 1: not a readable image: it is empty"):
        cifar100(root=str(root), on_error="skip")


def test_a_shard_that_is_lost_in_the_middle_is_named(small_cifar):
    root, _, _ = small_cifar
    (root / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00000-of-00002\* is missing"):
        cifar100(root=str(root))


def test_an_image_of_the_wrong_size_is_named(small_cifar):
    message = "row 2: not a readable image: expected 32 x 32 pixels, got 16 x 24"
    with pytest.raises(ValueError, match=message):
        cifar100(root=with_row(small_cifar[0], pixels(1, 24, 16)[0]))


def test_gray_images_become_color(small_cifar):
    gray = pixels(1)[0, ..., 0]
    data = cifar100(root=with_row(small_cifar[0], gray))
    assert np.array_equal(data.train.pixels[2], np.repeat(gray[..., None], 3, axis=-1))


def test_wrong_columns_are_named(small_cifar):
    root, _, _ = small_cifar
    path = root / "train-00001-of-00002.parquet"
    write_shard(path, pixels(1), [0], image="picture", label="kind")
    message = (
        "00001-of-00002.parquet has the columns picture, kind; cifar100 needs img .* fine_label"
    )
    with pytest.raises(ValueError, match=message):
        cifar100(root=str(root))


def test_a_label_beyond_the_classes_is_named(small_cifar):
    message = r"train-00000-of-00002.parquet, row 2: expected a label from 0 to 99, .* got 100$"
    with pytest.raises(ValueError, match=message):
        cifar100(root=with_row(small_cifar[0], pixels(1)[0], label=100))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], "train-00001-of-00002.parquet, row 1: .* got None"),
        ([0.0, 1.5], "train-00001-of-00002.parquet, row 0: .* got 0.0"),
        (["cat", "dog"], "fine_label needs whole numbers, got 'cat'"),
    ],
)
def test_labels_that_are_no_whole_numbers_are_named(small_cifar, labels, message):
    root, _, _ = small_cifar
    write_shard(root / "train-00001-of-00002.parquet", pixels(2), labels)
    with pytest.raises(ValueError, match=message):
        cifar100(root=str(root))


def test_shards_without_a_row_are_named(small_cifar):
    root, _, _ = small_cifar
    empty = parquet.read_table(root / "train-00001-of-00002.parquet").slice(0, 0)
    for path in root.glob("train-*.parquet"):
        parquet.write_table(empty, path)
    with pytest.raises(ValueError, match=str(root)):
        cifar100(root=str(root))


def test_another_number_of_classes_is_refused(tmp_path):
    for part in ("train", "test"):
        write_shard(tmp_path / f"{part}-0.parquet", pixels(1), [0], names=["a", "b"])
    with pytest.raises(ValueError, match="has 2 classes, cifar100 has 100"):
        cifar100(root=str(tmp_path))


@pytest.mark.slow
def test_the_whole_cifar100_is_read_without_loss(shared):
    root = shared("data/cifar100")
    data = cifar100(root=str(root))
    assert data.train.target.bincount().tolist() == [500] * 100
    assert data.test.target.bincount().tolist() == [100] * 100
    assert (data.classes[0], data.classes[99]) == ("apple", "worm")
    # The statistics that github.com/weiaicunzai/pytorch-cifar100 publishes to the last digit.
    values = data.train.pixels.double() / 255
    assert values.mean((0, 1, 2)).tolist() == pytest.approx(
        [0.5070751592371323, 0.48654887331495095, 0.4409178433670343], rel=1e-12
    )
    assert values.std((0, 1, 2), correction=0).tolist() == pytest.approx(
        [0.2673342858792401, 0.2564384629170883, 0.27615047132568404], rel=1e-9
    )
    table = parquet.read_table(next(root.rglob("test-*.parquet")))
    for row in range(0, 10_000, 997):
        picture = Image.open(io.BytesIO(table["img"][row].as_py()["bytes"]))
        assert np.array_equal(data.test.pixels[row], np.asarray(picture))
        assert data.test.target[row] == table["fine_label"][row].as_py()


# --- Folders -------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Two pictures of two classes in each of two trees, 16 x 16."""
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels(1, 16, 16, label)[0]).save(tmp_path / part / name / "0.png")
    return tmp_path


def read_all(images):
    return images.read(torch.arange(len(images.target)), None)


def as_seen(image):
    """What a network is to see of a picture of 16 x 16: the middle 14 x 14, which is not scaled."""
    return normalize(torch.from_numpy(image[None, 1:15, 1:15].copy()), MEAN, STD)[0]


def test_folders_are_classes(tree):
    data = folder(root=str(tree), size=14)
    assert list(data.classes) == ["cat", "dog"]
    assert data.train.target.tolist() == data.test.target.tolist() == [0, 1]
    for label in (0, 1):
        assert torch.equal(read_all(data.train)[label], as_seen(pixels(1, 16, 16, label)[0]))


def test_statistics_are_those_of_imagenet(tree):
    data = folder(root=str(tree))
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert read_all(data.test).shape == (2, 3, 224, 224)


def test_test_serves_where_there_is_no_val(tree):
    (tree / "val").rename(tree / "test")
    assert len(folder(root=str(tree)).test.target) == 2


GRAY = pixels(1, 16, 16, seed=5)[0, ..., 0]
COLOR = pixels(1, 16, 16, seed=6)[0] // 64 * 64  # few colors, so that a palette holds them all
MODES = {
    "gray": (Image.fromarray(GRAY), "png", {}, np.stack([GRAY] * 3, -1)),
    "gray, transparent": (Image.fromarray(GRAY).convert("LA"), "png", {}, np.stack([GRAY] * 3, -1)),
    "gray, 16 bits": (
        Image.fromarray(GRAY.astype(np.uint16) * 257),
        "png",
        {},
        np.stack([GRAY] * 3, -1),
    ),
    "color, transparent": (Image.fromarray(COLOR).convert("RGBA"), "png", {}, COLOR),
    "palette": (Image.fromarray(COLOR).quantize(256), "png", {}, COLOR),
    "palette, transparent": (
        Image.fromarray(COLOR).quantize(256),
        "png",
        {"transparency": bytes([255] * 256)},
        COLOR,
    ),
    "black and white": (
        Image.fromarray(GRAY > 127),
        "png",
        {},
        np.stack([(GRAY > 127) * np.uint8(255)] * 3, -1),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_kind_become_color(tree, mode):
    picture, suffix, options, expected = MODES[mode]
    picture.save(tree / "train" / "cat" / f"0.{suffix}", **options)
    found = read_all(folder(root=str(tree), size=14).train)[0]
    torch.testing.assert_close(found, as_seen(expected))


def test_cmyk_pictures_become_color(tree):
    flat = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan alone
    (tree / "train" / "cat" / "0.png").unlink()
    flat.save(tree / "train" / "cat" / "0.tiff")
    found = read_all(folder(root=str(tree), size=14).train)[0]
    torch.testing.assert_close(found, as_seen(np.full((16, 16, 3), (0, 255, 255), np.uint8)))


def test_small_pictures_are_cropped_as_those_in_memory_are(tree):
    found = folder(root=str(tree), size=16, padding=3).train
    whole = torch.from_numpy(np.concatenate([pixels(1, 16, 16, label) for label in (0, 1)]))
    expected = InMemory(whole, torch.arange(2), MEAN, STD, padding=3, flip=True)
    for key in (None, (0, 1), (5, 2)):
        index = torch.tensor([1, 0])
        assert torch.equal(found.read(index, key), expected.read(index, key))


def test_pictures_that_may_not_be_mirrored_are_not(tree):
    across = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None] * 16, (16, 16, 3))
    Image.fromarray(np.ascontiguousarray(across)).save(tree / "train" / "cat" / "0.png")
    train = folder(root=str(tree), size=8, flip=False).train
    for epoch in range(10):
        red = train.read(torch.tensor([0]), (0, epoch))[0, 0]
        assert (red[:, 0] < red[:, -1]).all()


@pytest.mark.parametrize("options", [{"size": 0}, {"padding": -1}])
def test_squares_that_are_none_are_refused(tree, options):
    with pytest.raises(ValueError, match="size must be 1 or more and padding 0 or more"):
        folder(root=str(tree), **options)


def test_the_order_of_pictures_is_that_of_torchvision(tree):
    from torchvision.datasets import ImageFolder

    for name in ("Z.PNG", "a.jpg", "b/c.webp", "B/1.png"):
        path = tree / "train" / "cat" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(1, 4, 4)[0]).save(path, path.suffix[1:].replace("jpg", "jpeg"))
    found, expected = folder(root=str(tree)).train, ImageFolder(tree / "train")
    assert list(found.stored.paths) == [path for path, _ in expected.samples]
    assert found.target.tolist() == expected.targets


def test_files_that_are_no_pictures_are_counted_and_named(tree):
    for place in ("train/cat/notes.txt", "train/cat/1.gif", "train/list.csv", "val/dog/.DS_Store"):
        (tree / place).write_bytes(b"")
    data = folder(root=str(tree), size=8)
    (line,) = data.faults.lines()
    assert line.startswith("4 files that are not pictures were left out: ")
    for name in ("list.csv", "1.gif", "notes.txt", ".DS_Store"):
        assert name in line
    assert len(data.train.target) == 2


def test_only_the_first_ten_are_named(tree):
    for number in range(12):
        (tree / "train" / "cat" / f"{number:02}.txt").touch()
    faults = folder(root=str(tree)).faults
    assert "09.txt and 2 more" in faults.lines()[0]
    assert "10.txt" not in faults.lines()[0]
    assert faults.facts()["left_out"]["count"] == 12
    assert len(faults.facts()["left_out"]["first"]) == 10


@pytest.mark.parametrize("names", [("Cat", "cat"), ("\u00e9t\u00e9", "e\u0301te\u0301")])
def test_folders_of_one_name_in_two_spellings_are_refused(tree, names):
    for name in names:
        shutil.rmtree(tree / "train" / name, ignore_errors=True)
        (tree / "train" / name).mkdir()
    if len(list((tree / "train").iterdir())) < 3:
        pytest.skip("this file system knows them as one")
    with pytest.raises(ValueError, match="train: the classes .* differ only in case"):
        folder(root=str(tree))


def add_pictures(tree, count=4):
    for label, name in enumerate(("cat", "dog")):
        for number in range(1, count):
            image = pixels(1, 16, 16, 10 * number + label)[0]
            Image.fromarray(image).save(tree / "train" / name / f"{number}.png")


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_a_corrupt_picture_is_replaced_by_the_next_of_its_class_where_told(tree, content):
    add_pictures(tree)
    expected = folder(root=str(tree), size=8).train.read(torch.arange(8), None)
    (tree / "train" / "cat" / "2.png").write_bytes(content)
    (tree / "train" / "dog" / "3.png").write_bytes(content)  # the last: it goes on with the first
    data = folder(root=str(tree), size=8, on_error="skip")
    found = read_all(data.train)
    assert torch.equal(found, expected[[0, 1, 3, 3, 4, 5, 6, 4]])
    assert data.train.target.tolist() == [0] * 4 + [1] * 4
    for _ in range(2):  # again and again, each is counted once
        batches = list(training_batches(data.train, 4, 0, 1))
        assert sorted(sum((b.index.tolist() for b in batches), [])) == list(range(8))
    (line,) = data.faults.lines()
    assert line.startswith("2 unreadable pictures replaced by the next of the same class: ")
    for name in ("cat/2.png", "dog/3.png"):
        assert f"{name}: not a readable image: it" in line


def test_a_replacement_is_augmented_by_the_number_of_the_replaced(tree):
    add_pictures(tree)
    path = tree / "train" / "cat" / "1.png"
    following = (tree / "train" / "cat" / "2.png").read_bytes()
    path.write_bytes(b"")
    found = folder(root=str(tree), size=8, on_error="skip").train.read(torch.arange(8), (0, 1))
    path.write_bytes(following)
    expected = folder(root=str(tree), size=8).train.read(torch.arange(8), (0, 1))
    assert torch.equal(found, expected)


def test_pictures_to_judge_by_are_never_replaced(tree):
    add_pictures(tree)
    shutil.copy(tree / "train" / "cat" / "1.png", tree / "val" / "cat" / "1.png")
    (tree / "val" / "cat" / "0.png").write_bytes(b"")
    data = folder(root=str(tree), size=8, on_error="skip")
    with pytest.raises(ValueError, match="val/cat/0.png: not a readable image: it is empty"):
        list(plain_batches(data.test, 2))


def test_a_class_without_a_readable_picture_is_refused(tree):
    (tree / "train" / "cat" / "0.png").write_bytes(b"")
    data = folder(root=str(tree), size=8, on_error="skip")
    with pytest.raises(ValueError, match="cat/0.png: not a readable image, nor is any other of cl"):
        read_all(data.train)


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (60, 1), (300, 40)])
@pytest.mark.parametrize("augmented", [None, (0, 1)])
def test_pictures_of_every_shape_become_squares(tree, shape, augmented):
    flat = np.full((*shape, 3), (10, 200, 90), np.uint8)
    Image.fromarray(flat).save(tree / "train" / "cat" / "0.png")
    found = folder(root=str(tree), size=8).train.read(torch.tensor([0]), augmented)
    expected = normalize(torch.tensor([10, 200, 90]).byte().expand(1, 8, 8, 3), MEAN, STD)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
@pytest.mark.parametrize("augmented", [None, (0, 1)])
def test_a_corrupt_picture_is_named(tree, content, augmented):
    path = tree / "train" / "dog" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    data = folder(root=str(tree), size=8)
    with pytest.raises(ValueError, match=r"train/dog/0.png: not a readable image"):
        data.train.read(torch.arange(2), augmented)


def test_a_picture_of_absurd_size_is_named(tree, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 16 x 16 is more than twice that
    with pytest.raises(ValueError, match=r"0.png: not a readable image"):
        read_all(folder(root=str(tree), size=8).train)


def test_a_picture_that_has_gone_is_named(tree):
    data = folder(root=str(tree), size=8)
    (tree / "val" / "cat" / "0.png").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="val/cat/0.png"):
        read_all(data.test)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_tree_is_named(tree, part):
    shutil.rmtree(tree / part)
    with pytest.raises(FileNotFoundError, match=rf"{part} is missing: data.root needs train/ and"):
        folder(root=str(tree))


def test_a_class_without_pictures_is_named(tree):
    (tree / "train" / "cat" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="cat"):
        folder(root=str(tree))


def test_classes_that_differ_are_named(tree):
    (tree / "val" / "dog").rename(tree / "val" / "wolf")
    with pytest.raises(ValueError, match="train/ and val/ differ in the classes dog, wolf"):
        folder(root=str(tree))


def test_a_picture_is_augmented_by_its_index_alone(tree):
    images = folder(root=str(tree), size=8).train
    both = images.read(torch.arange(2), (0, 1))
    assert torch.equal(images.read(torch.tensor([1]), (0, 1))[0], both[1])
    assert not torch.equal(images.read(torch.arange(2), (0, 2)), both)
    assert not torch.equal(images.read(torch.arange(2), (1, 1)), both)


def test_random_parts_have_the_areas_and_ratios_of_the_paper(tmp_path):
    # Red grows to the right and green downwards, so that a scaled part tells where it was cut.
    height, width, size, count = 160, 240, 16, 600
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    picture = np.stack([across, down, 0 * down], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "ramp.png")
    files = Files(Names([str(tmp_path / "ramp.png")] * count))
    images = Pictures(files, torch.zeros(count).long(), CropConfig(size))
    seen = images.read(torch.arange(count), (0, 1)).double()
    red, green = (255 * (seen[:, c] * STD[c] + MEAN[c]) for c in (0, 1))

    def extent(ramp):  # the outermost pixels are centered half a step inside
        return (ramp[..., -1] - ramp[..., 0]).abs().mean(1) * size / (size - 1)

    wide, high = extent(red), extent(green.transpose(1, 2))
    area, ratio = wide * high / (width * height), wide / high
    assert area.min() > 0.07
    assert area.max() < 1.01
    small = area < 0.4  # parts that no side of the picture limits
    logarithm = ratio[small].log()
    assert stats.kstest(area[small], "uniform", (0.08, 0.32)).pvalue > 1e-3
    assert stats.kstest(logarithm, "uniform", (math.log(3 / 4), math.log(16 / 9))).pvalue > 1e-3
    first = red.amin((1, 2)) + 0.5 - wide / (2 * size), green.amin((1, 2)) + 0.5 - high / (2 * size)
    left, top = (first[0] / (width - wide))[small], (first[1] / (height - high))[small]
    for place in (left, top):
        assert stats.kstest(place.clamp(0, 1), "uniform").pvalue > 1e-3
    for one, other in itertools.combinations((area[small], logarithm, left, top), 2):
        assert stats.spearmanr(one, other).pvalue > 1e-3
    mirrored = int((red[:, 0, 0] > red[:, 0, -1]).sum())
    assert stats.binomtest(mirrored, count).pvalue > 1e-3
    assert (red > -1).all()
    assert (red < width).all()


def test_catalog_of_data_sets():
    pictures = {"folder", "parquet", "webdataset", "dataset"}
    assert set(DATA) == {"cifar10", "cifar100", "digits"} | pictures
    assert all(load.__doc__ for load in DATA.values())
