"""Stratified, nested subsets of training and evaluation images, against plain loops."""

from fractions import Fraction

import pytest
import torch

from topkd.config import recipe
from topkd.config.sections import DataSection
from topkd.config.validation import RecipeError
from topkd.data import Data, InMemory, stratified_order
from topkd.training.build import load_data

COUNTS = (200, 90, 40, 7)


def images(counts):
    """Images whose pixels are their number, with mixed labels."""
    target = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    target = target[torch.randperm(len(target))]
    pixels = torch.arange(len(target))[:, None, None, None].expand(-1, 2, 2, 3).to(torch.uint8)
    return InMemory(pixels, target, (0.5,) * 3, (0.25,) * 3, padding=1, flip=False)


def uneven(train=COUNTS, test=(50, 20, 10, 5)):
    return Data("uneven", images(train), images(test), list("abcd"), (0.5,) * 3, (0.25,) * 3)


def seats(counts, total):
    """Sainte-Laguë's apportionment, after one seat for each class."""
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    found = [0] * len(counts)
    for c in order[:total]:
        found[c] = 1
    for _ in range(total - len(counts)):
        free = [c for c in range(len(counts)) if found[c] < counts[c]]
        best = max(free, key=lambda c: Fraction(counts[c], 2 * found[c] + 1))
        found[best] += 1
    return found


def bins(target):
    return target.bincount(minlength=4).tolist()


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.02, 0.1, 1 / 3, 0.5, 0.999])
def test_a_fraction_is_apportioned_to_the_classes(fraction):
    part = uneven().with_fraction(fraction).train
    assert bins(part.target) == seats(COUNTS, max(4, round(fraction * sum(COUNTS))))


@pytest.mark.parametrize("number", [1, 3, 4, 5, 17, 60, 85, 1000])
def test_a_limit_of_evaluation_images_is_exact_and_apportioned(number):
    data = uneven()
    part = data.with_test_limit(number)
    assert bins(part.test.target) == seats((50, 20, 10, 5), min(number, 85))
    assert part.train is data.train


def test_an_order_is_a_permutation_and_depends_on_the_labels_only():
    target = images(COUNTS).target
    order = stratified_order(target)
    assert order.sort().values.tolist() == list(range(sum(COUNTS)))
    torch.manual_seed(99)
    assert torch.equal(order, stratified_order(target.clone()))


def test_balanced_classes_have_equal_shares():
    even = uneven(train=(100,) * 4)
    assert bins(even.with_fraction(0.07).train.target) == [7] * 4


def test_smaller_subsets_are_parts_of_larger_ones():
    data = uneven()
    train = [set(data.with_fraction(f).train.index.tolist()) for f in (0.01, 0.05, 0.1, 0.5, 1.0)]
    test = [set(data.with_test_limit(n).test.index.tolist()) for n in (1, 3, 9, 40, 85)]
    for nested in (train, test):
        assert all(small < large for small, large in zip(nested, nested[1:], strict=False))


def section(**options):
    return DataSection(name="digits", **options)


def test_the_fraction_is_taken_after_the_validation_split_and_before_the_limit():
    whole = load_data(section(validation=0.2))
    part = load_data(section(validation=0.2, fraction=0.1))
    remaining = len(whole.train.target)
    assert len(part.train.target) == round(0.1 * remaining)
    assert torch.equal(whole.test.target, part.test.target)
    shown = [data.train.read(torch.arange(len(data.train.target)), None) for data in (whole, part)]
    known, few = ({image.numpy().tobytes() for image in images} for images in shown)
    assert few < known
    limited = load_data(section(validation=0.2, fraction=0.1, limit=50, test_limit=30))
    assert len(limited.train.target) <= 55
    assert len(limited.test.target) == 30
    assert limited.eval_split == "validation"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fraction=0", "data.fraction: expected greater than 0, got 0"),
        ("fraction=1.5", "data.fraction: expected less than or equal to 1, got 1.5"),
        ("fraction=.nan", "data.fraction: expected a finite number, got nan"),
        ("test_limit=0", "data.test_limit: expected greater than 0, got 0"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(RecipeError) as error:
        recipe.load("digits", [f"data.{change}"])
    assert str(error.value) == message


def test_defaults_keep_the_hash_of_a_recipe():
    plain = recipe.load("digits").hash
    assert plain == recipe.load("digits", ["data.fraction=1", "data.test_limit=null"]).hash
    assert plain != recipe.load("digits", ["data.fraction=0.5"]).hash
