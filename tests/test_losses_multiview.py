"""Distillation on the levels of images, batches and classes, of one view and of two."""

import math
from dataclasses import replace

import pytest
import torch
from reference import logits as written_out
from reference.features import CLOUD, batch, features

from topkd.losses import MLKD
from topkd.losses.functional import multi_level_distillation
from topkd.losses.mlkd import batch_level, class_level, instance_level, low_confidence

EVERY_WAY = [
    (views, faithful, standardize)
    for views in (1, 2)
    for faithful in (True, False)
    for standardize in (True, False)
]


def of_two_views(shown):
    half = torch.arange(CLOUD // 2)
    return replace(shown, index=torch.cat([half, half]))


# The authors' base temperature -> all temperatures, in order. It is 4 in MLKD, and 2 with
# standardized logits (Sun et al., CVPR 2024).
BASES = {4: (2.0, 3.0, 4.0, 5.0, 6.0), 2: (2.0, 2.0, 3.0, 5.0, 6.0), 7.5: (2.0, 3.0, 5.0, 7.5, 6.0)}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("views", "faithful", "standardize"), EVERY_WAY)
def test_value_and_gradient_are_the_definition_in_plain_loops(views, faithful, standardize, base):
    student, teacher = features(3, seed=1), features(5, seed=2)
    shown = of_two_views(batch()) if views == 2 else batch()
    loss = MLKD(views=views, faithful=faithful, standardize=standardize, temperatures=BASES[base])
    student.logits.requires_grad_()
    value = loss(student, teacher, shown)
    value.backward()

    def oracle(rows):
        options = views, faithful, standardize, base
        return written_out.multi_level(rows, teacher.logits.tolist(), *options)

    rows = student.logits.tolist()
    assert value.item() == pytest.approx(oracle(rows), rel=1e-11)
    expected = torch.tensor(written_out.slopes(oracle, rows), dtype=torch.float64)
    torch.testing.assert_close(student.logits.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n", [5, 6])  # the median is one of the values, or between two
@pytest.mark.parametrize(("views", "faithful", "standardize"), EVERY_WAY[:4])
def test_batches_of_any_size_are_halved_at_the_median(n, views, faithful, standardize):
    student, teacher = features(3, seed=1, n=n).logits, features(5, seed=2, n=n).logits
    value = multi_level_distillation(
        student, teacher, views=views, faithful=faithful, standardize=standardize
    )
    expected = written_out.multi_level(
        student.tolist(), teacher.tolist(), views, faithful, standardize
    )
    assert value.item() == pytest.approx(expected, rel=1e-11)


def test_the_temperatures_are_by_default_those_of_the_authors():
    student, teacher = features(3, seed=1), features(5, seed=2)
    default = MLKD()(student, teacher, batch())
    assert torch.equal(default, MLKD(temperatures=BASES[4])(student, teacher, batch()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((), r"temperatures must be at least one, got \(\)"),
        ((2.0, 0.0), "temperatures must be positive, got 0.0"),
        ((2.0, math.inf), "temperatures must be positive, got inf"),
    ],
)
def test_refuses_temperatures_that_are_none(values, message):
    with pytest.raises(ValueError, match=message):
        MLKD(temperatures=values)
    with pytest.raises(ValueError, match=message):
        multi_level_distillation(torch.zeros(4, 3), torch.zeros(4, 3), temperatures=values)


def test_levels_are_frobenius_norms():
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    s, t = (student / 3).softmax(1), (teacher / 3).softmax(1)
    for level, gap in (
        (batch_level, t @ t.T - s @ s.T),
        (class_level, t.T @ t - s.T @ s),
    ):
        expected = torch.linalg.matrix_norm(gap) ** 2 / len(gap)
        torch.testing.assert_close(level(student, teacher, 3.0).mean(), expected)


def test_levels_of_two_sure_images_are_known():
    # The teacher tells both images apart, the student takes them for one class.
    far = 1e4
    teacher = torch.tensor([[far, 0.0], [0.0, far]])
    student = torch.tensor([[far, 0.0], [far, 0.0]])
    assert batch_level(student, teacher, 2.0).tolist() == [1, 1]  # 0 in place of 1, once a row
    assert class_level(student, teacher, 2.0).tolist() == [1, 1]  # diag(1, 1) against diag(2, 0)
    assert instance_level(student, teacher, 2.0).tolist() == [0, 4 * far / 2]


def test_the_unsure_half_is_found():
    probabilities = torch.tensor([[0.9, 0.06, 0.04], [0.5, 0.3, 0.2], [0.7, 0.1, 0.2]])
    images, classes = low_confidence(probabilities.log())
    assert images.tolist() == [False, True, True]
    assert classes.tolist() == [False, True, True]  # of the masses 2.1, 0.46 and 0.44
    assert low_confidence(torch.zeros(3, 4))[0].all()  # all as unsure as each other


def test_authors_mask_halves_and_chooses_nothing():
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    whole = math.fsum(
        level(student, teacher, temperature).mean().item()
        for level in (instance_level, batch_level, class_level)
        for temperature in (2.0, 3.0, 4.0, 5.0, 6.0)
    )
    assert multi_level_distillation(student, teacher).item() == pytest.approx(whole / 2)


def test_a_sure_image_teaches_nothing_by_itself():
    student, teacher = features(3, seed=1).logits.requires_grad_(), features(5, seed=2).logits
    images, _ = low_confidence(teacher)
    (images * instance_level(student, teacher, 4.0)).mean().backward()
    assert (student.grad[~images] == 0).all()
    assert (student.grad[images] != 0).all()


@pytest.mark.parametrize("index", [[0, 1, 2, 0, 2, 1], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0]])
def test_refuses_a_batch_that_does_not_hold_two_views(index):
    n = len(index)
    shown = replace(batch(n), index=torch.tensor(index))
    student, teacher = features(3, seed=1, n=n), features(5, seed=2, n=n)
    with pytest.raises(ValueError, match="two views need batches whose second half are the images"):
        MLKD(views=2)(student, teacher, shown)


def test_refuses_two_views_of_an_odd_number_of_rows():
    with pytest.raises(ValueError, match="two views need an even number of rows, got 5"):
        multi_level_distillation(torch.zeros(5, 4), torch.zeros(5, 4), views=2)


@pytest.mark.parametrize("views", [0, 3])
def test_refuses_other_numbers_of_views(views):
    with pytest.raises(ValueError, match=f"views must be 1 or 2, got {views}"):
        MLKD(views=views)
