"""Stronger augmentation, by torchvision's own transforms, and reading by worker processes."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from reference import data as reference
from scipy import stats
from torchvision.transforms import v2

from topkd.config.sections import DataSection
from topkd.data import (
    Augmentation,
    Augmented,
    Data,
    DataIssues,
    InMemory,
    plain_batches,
    training_batches,
    with_augmentation,
)
from topkd.data import augmented as module
from topkd.data.augment import draws
from topkd.data.augmented import OPERATIONS, cut_box, erase, randaugment
from topkd.training.build import load_data

HALF = ((0.5,) * 3, (0.25,) * 3)
# Python warns of what every DataLoader does: it forks a process that has threads.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def in_memory(count=24, size=16, classes=4, flip=True):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    target = torch.arange(count) % classes
    return InMemory(torch.from_numpy(pixels), target, *HALF, padding=2, flip=flip)


def augmented(images=None, workers=0, **options):
    return Augmented(images or in_memory(), Augmentation(**options), 4, *HALF, workers)


# --- RandAugment ---------------------------------------------------------------------------------


def picture(height=40, width=50):
    """Soft colors, so that every operation shows."""
    generator = np.random.default_rng(3)
    small = generator.integers(40, 200, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("magnitude", [0, 10, 20, 30])
def test_operations_are_those_of_torchvision(magnitude):
    image, theirs, seen = picture(), v2.RandAugment(1, magnitude), set()
    for seed in range(110):
        torch.manual_seed(seed)  # the two numbers that torchvision is going to draw
        choice, direction = int(torch.randint(len(OPERATIONS), ())), float(torch.rand(()))
        torch.manual_seed(seed)
        expected = theirs(image)
        found = randaugment(
            image, [(choice + 0.5) / len(OPERATIONS), direction], magnitude=magnitude
        )
        apart = np.asarray(found).astype(int) - np.asarray(expected)
        assert abs(apart).max() <= 1, OPERATIONS[choice]  # theirs are computed in float32
        seen.add((choice, direction > 0.5))
    assert len(seen) == 2 * len(OPERATIONS)


def test_operations_follow_one_another():
    image, numbers = picture(), [5.5 / 14, 0.7, 11.5 / 14, 0.2]
    first = randaugment(image, numbers[:2], magnitude=9)
    assert randaugment(image, numbers, magnitude=9) == randaugment(first, numbers[2:], magnitude=9)


@pytest.mark.parametrize("number", [0.0, math.nextafter(1, 0)])
def test_the_first_and_the_last_operation_can_be_drawn(number):
    randaugment(picture(), [number, number], magnitude=9)


def test_randaugment_is_a_function_of_seed_epoch_and_index():
    images = augmented(randaugment=(2, 9))
    whole = images.batch(torch.arange(24), (0, 1)).images
    some = torch.tensor([7, 3, 3])
    assert torch.equal(images.batch(some, (0, 1)).images, whole[some])
    for other in ((0, 2), (1, 1)):
        assert not torch.equal(images.batch(torch.arange(24), other).images, whole)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(images.read(torch.arange(24), (0, 1)), whole)
    assert torch.equal(torch.get_rng_state(), before)  # the networks' numbers are left alone


def test_randaugment_follows_the_crop_by_the_numbers_after_its_own():
    images, index = in_memory(), torch.tensor([4, 0, 11])
    found = augmented(images, randaugment=(2, 9)).batch(index, (3, 2)).images
    cropped = images.read_bytes(index, (3, 2))
    for place, i in enumerate(index.tolist()):
        numbers = [reference.draw(3, 2, i, number) for number in range(7, 11)]
        image = randaugment(Image.fromarray(cropped[place].numpy()), numbers, magnitude=9)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(found[place], (expected - 0.5) / 0.25, atol=1e-5, rtol=1e-5)


def test_plain_images_are_left_alone():
    images, strong = in_memory(), augmented(randaugment=(2, 9), mixup=1.0, views=2)
    assert torch.equal(strong.read(torch.arange(5), None), images.read(torch.arange(5), None))
    for batch in plain_batches(strong, 6):
        assert batch.soft is None
        assert torch.equal(batch.images, images.read(batch.index, None))


# --- Two views -----------------------------------------------------------------------------------


def test_two_views_are_the_weak_and_the_strong_one():
    images, index = in_memory(), torch.tensor([4, 0, 11])
    batch = augmented(images, views=2).batch(index, (0, 1))
    assert batch.index.tolist() == [4, 0, 11] * 2
    assert torch.equal(batch.target, batch.index % 4)
    assert torch.equal(batch.images[:3], images.read(index, (0, 1)))
    assert not torch.equal(batch.images[3:], batch.images[:3])
    told = augmented(images, views=2, randaugment=(2, 10)).batch(index, (0, 1))
    assert torch.equal(told.images, batch.images)  # as FixMatch has it
    single = augmented(images, randaugment=(2, 10)).batch(index, (0, 1)).images
    differs = (single != batch.images[3:]).any(1)  # the square alone
    assert (batch.images[3:].permute(0, 2, 3, 1)[differs] == 0).all()
    assert differs.any((1, 2)).all()


def test_a_batch_of_two_views_is_an_epoch_of_the_same_images():
    weak = list(training_batches(in_memory(), 6, 3, 2))
    both = list(training_batches(augmented(views=2), 6, 3, 2))
    for one, two in zip(weak, both, strict=True):
        assert torch.equal(two.images[:6], one.images)
        assert torch.equal(two.index, one.index.repeat(2))


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (9, 5), (4, 12), (3, 3)])
def test_squares_are_erased_one_pixel_at_a_time(size):
    images, uniform = torch.randn(6, 3, *size), torch.rand(6, 2).double()
    uniform[0], uniform[1] = 0.0, math.nextafter(1, 0)
    expected = [
        [reference.erased(channel.tolist(), *numbers.tolist()) for channel in image]
        for image, numbers in zip(images, uniform, strict=True)
    ]
    erase(images, uniform)
    assert torch.equal(images, torch.tensor(expected))


# --- mixup and CutMix ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.3), (0.99, 0.99)])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_boxes_are_those_of_the_paper(share, place, size):
    expected = reference.kept_by_cutmix(*size, share, *place)
    found = cut_box(*size, share, place)
    assert torch.equal(found.bool(), torch.tensor(expected))
    assert found.mean() >= 0.5


@pytest.fixture
def chosen(monkeypatch):
    """Mixes by numbers that a test chooses: the share and the middle of the box."""

    class Generator:
        def __init__(self, share, place):
            self.share, self.place = share, place

        def beta(self, a, b):
            assert a == b
            return self.share

        def random(self, count=None):
            return np.array(self.place)

    def choose(share, place=(0.5, 0.5)):
        monkeypatch.setattr(module.np.random, "default_rng", lambda key: Generator(share, place))

    return choose


@pytest.mark.parametrize("views", [1, 2])
def test_mixup_is_that_of_torchvision(chosen, views):
    index, images = torch.tensor([4, 1, 11, 6]), augmented(mixup=0.4, views=views)
    plain = augmented(views=views).batch(index, (0, 1))
    chosen(0.7)
    mixed = images.batch(index, (0, 1))
    theirs = v2.MixUp(num_classes=4)
    for half in range(views):
        rows = slice(4 * half, 4 * half + 4)
        labels = plain.target[rows]
        params = {"lam": 0.7, "labels": labels, "batch_size": 4}
        expected = theirs.transform(plain.images[rows], params)
        torch.testing.assert_close(mixed.images[rows], expected)
        torch.testing.assert_close(mixed.soft[rows], theirs.transform(labels, params))
    assert torch.equal(mixed.target, plain.target)
    assert torch.equal(mixed.index, plain.index)
    assert mixed.images.is_contiguous()


def test_cutmix_is_that_of_torchvision(chosen):
    index, strong = torch.tensor([4, 1, 11, 6]), augmented(cutmix=1.0)
    images, labels = strong.images.read(index, (0, 1)), strong.target[index]
    chosen(0.75, (0.25, 0.5))
    mixed = strong.batch(index, (0, 1))
    # A box of 8 x 8 around row 4 and column 8 of 16 x 16.
    params = {"box": (4, 0, 12, 8), "lam_adjusted": 0.75, "labels": labels, "batch_size": 4}
    theirs = v2.CutMix(num_classes=4)
    torch.testing.assert_close(mixed.images, theirs.transform(images, params))
    torch.testing.assert_close(mixed.soft, theirs.transform(labels, params))


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1}])
def test_the_label_that_counts_most_is_the_image_s_own(options):
    images = augmented(**options)
    shares = []
    for epoch in range(40):
        for batch in training_batches(images, 8, 0, epoch):
            own = batch.soft.gather(1, batch.target[:, None])
            assert (own >= 0.5 - 1e-6).all()
            torch.testing.assert_close(batch.soft.sum(1), torch.ones(8))
            assert torch.equal(batch.target, batch.index % 4)
            shares.append(own.min().item())
    assert len({round(share, 4) for share in shares}) > 20


def test_shares_are_drawn_from_the_beta_distribution():
    # Of one channel of black and white images: what a white one kept tells the share.
    white = torch.zeros(400, 2, 2, 3, dtype=torch.uint8)
    white[::2] = 255
    images = InMemory(white, torch.arange(400) % 2, (0.0,) * 3, (1.0,) * 3, padding=0, flip=False)
    mixed, found = Augmented(images, Augmentation(mixup=0.4), 2, images.mean, images.std), []
    for first in range(0, 400, 2):
        for epoch in (1, 2):
            batch = mixed.batch(torch.tensor([first, first + 1]), (0, epoch))
            found.append(batch.images[0, 0, 0, 0].item())
            assert batch.soft[0, 0].item() == pytest.approx(found[-1], abs=1e-6)
    folded = stats.beta(0.4, 0.4)
    # The greater of a share and its rest.
    law = stats.kstest(found, lambda x: np.clip(folded.cdf(x) - folded.cdf(1 - x), 0, 1))
    assert law.pvalue > 1e-3


def test_a_batch_is_mixed_in_one_way_and_each_in_another():
    images = augmented(mixup=1.0, cutmix=1.0)
    first = list(training_batches(images, 4, 0, 1))
    again = list(training_batches(images, 4, 0, 1))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.soft, two.soft)
    assert len({round(batch.soft.max().item(), 5) for batch in first}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"randaugment": (0, 9)}, "got 0 and 9"),
        ({"randaugment": (2, 31)}, "got 2 and 31"),
        ({"mixup": -1.0}, "got -1.0, 0.0 and 1"),
        ({"views": 3}, "views 1 or 2, got 0.0, 0.0 and 3"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


# --- Workers -------------------------------------------------------------------------------------


@FORKS
def test_processes_read_what_threads_read():
    options = {"randaugment": (2, 9), "mixup": 0.4, "views": 2}
    before = torch.get_rng_state()
    threads = list(training_batches(augmented(**options), 6, 3, 2))
    processes = list(training_batches(augmented(workers=2, **options), 6, 3, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(threads) == len(processes) == 4
    for one, other in zip(threads, processes, strict=True):
        for name in ("images", "target", "index", "soft"):
            assert torch.equal(getattr(one, name), getattr(other, name))


class Broken:
    """Images of which one cannot be read, or is noted as replaced."""

    blocks, target = None, torch.arange(8)

    def __init__(self, faults=None):
        self.faults = faults

    def read_bytes(self, index, augmented):
        if 5 in index:
            if self.faults is None:
                raise ValueError("image 5 is broken")
            self.faults.unreadable["5"] = "image 5 is broken"
        return torch.zeros(len(index), 4, 4, 3, dtype=torch.uint8)


@FORKS
def test_an_error_of_a_process_is_told_in_one_line():
    images = Augmented(Broken(), Augmentation(), 8, *HALF, workers=1)
    with pytest.raises(ValueError, match=r"^image 5 is broken$"):
        list(training_batches(images, 4, 0, 1))


@FORKS
def test_what_processes_replace_is_known_to_all():
    faults = DataIssues()
    images = Augmented(Broken(faults), Augmentation(), 8, *HALF, workers=2, faults=faults)
    assert len(list(training_batches(images, 4, 0, 1))) == 2
    assert faults.unreadable == {"5": "image 5 is broken"}


@FORKS
def test_an_epoch_that_is_left_early_leaves_no_process_behind():
    import multiprocessing

    batches = training_batches(augmented(workers=1), 2, 0, 1)
    next(batches)
    batches.close()
    assert not multiprocessing.active_children()


def test_batches_for_a_gpu_are_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = next(training_batches(augmented(mixup=1.0), 4, 0, 1))
    expected = (batch.images, batch.target, batch.index, batch.soft)
    assert {id(tensor) for tensor in expected} <= {id(tensor) for tensor in pinned}


# --- In recipes ----------------------------------------------------------------------------------


def test_without_options_nothing_is_put_around_the_images():
    data = load_data(DataSection(name="digits"))
    assert isinstance(data.train, InMemory)


def test_a_recipe_s_options_arrive():
    tree = {"name": "digits", "randaugment": {"operations": 3}, "mixup": 0.2, "cutmix": 1.0}
    section = DataSection.model_validate(tree | {"views": 2, "workers": 1, "validation": 0.1})
    data = load_data(section)
    assert data.train.augmentation == Augmentation((3, 9), 0.2, 1.0, 2)
    assert data.train.workers == 1
    assert data.train.classes == 10
    assert data.eval_split == "validation"
    assert not isinstance(data.test, Augmented)
    assert DataSection.model_validate(section.model_dump(mode="json")) == section


@pytest.mark.parametrize(("cores", "expected"), [(2, 0), (4, 3), (64, 8)])
def test_processes_are_chosen_where_they_pay(monkeypatch, cores, expected):
    monkeypatch.setattr(module, "cores", lambda: cores)
    data = Data("some", in_memory(), in_memory(), list("abcd"), *HALF)
    assert with_augmentation(data, Augmentation()) is data
    assert with_augmentation(data, Augmentation(mixup=1.0)).train.workers == 0
    for options in ({"randaugment": (2, 9)}, {"views": 2}):
        assert with_augmentation(data, Augmentation(**options)).train.workers == expected
    assert with_augmentation(data, Augmentation(), workers=3).train.workers == 3


def test_numbers_of_a_crop_are_not_used_again():
    assert not torch.equal(*draws(0, 1, torch.arange(4), 10)[:, [0, 7]].T)
