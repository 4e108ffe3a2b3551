"""One contract for every loss of the catalog."""

import pytest
import torch
from reference.features import CLOUD, WIDTH, agreeing_networks, batch, bound, source_in
from torch import nn
from torch.autograd import gradcheck

from topkd.features import Batch
from topkd.losses import LOSSES
from topkd.topology.approximation import Training

SHORT = Training(passes=2, epochs=2)
CASES = {name: (name, {}) for name in LOSSES} | {
    "ce, smoothed": ("ce", {"label_smoothing": 0.2}),
    "kd, hot": ("kd", {"temperature": 20.0}),
    "kd, standardized": ("kd", {"standardize": True}),
    "dkd, standardized": ("dkd", {"standardize": True}),
    "ctkd of dkd": ("ctkd", {"of": "dkd"}),
    "ctkd, standardized": ("ctkd", {"standardize": True}),
    "mlkd, clean masks": ("mlkd", {"faithful": False}),
    "mlkd, standardized": (
        "mlkd",
        {"standardize": True, "temperatures": (2.0, 2.0, 3.0, 5.0, 6.0)},
    ),
    "deit, soft": ("deit", {"kind": "soft"}),
    "deit, legacy": ("deit", {"kind": "soft", "legacy": True}),
    "topkd, exact image": ("topkd", {"form": "image"}),
    "topkd, RipsNet": ("topkd", {"via": "ripsnet", "training": SHORT}),
    "topkd, RipsNet of vectors": ("topkd", {"via": "ripsnet", "form": "vector", "training": SHORT}),
    "topkd, DistanceNet": ("topkd", {"via": "distancenet", "training": SHORT}),
}
WIDTHS = {"same width": 5, "narrower": 3}


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory):
    """One for the whole contract, so that each RipsNet is trained once."""
    return source_in(tmp_path_factory.mktemp("shared"))


@pytest.fixture(params=CASES)
def make(request, shared_source):
    """Builds one loss for a student of some width."""
    name, options = CASES[request.param]

    def build(width):
        own, student, teacher = agreeing_networks(LOSSES[name], shared_source, width)
        loss = bound(LOSSES[name], student, teacher, own, **options)
        for module in loss.modules():
            if isinstance(module, nn.BatchNorm2d):  # new ones put a ReLU at its kink
                nn.init.constant_(module.bias, 0.1)
        return loss.double().eval(), student, teacher

    build.name = request.param
    return build


@pytest.fixture(params=WIDTHS.values(), ids=WIDTHS)
def case(request, make):
    if request.param != WIDTH and not LOSSES[CASES[make.name][0]].info.any_width:
        with pytest.raises(ValueError, match="channels"):
            make(request.param)
        pytest.skip("refuses a student of another width, and says so")
    return make(request.param)


def test_value_is_a_finite_scalar(case):
    loss, student, teacher = case
    value = loss(student, teacher, batch())
    assert value.shape == ()
    assert value.isfinite()
    assert value.dtype == torch.float64


def test_order_of_the_batch_does_not_matter(case):
    loss, student, teacher = case
    order = torch.randperm(CLOUD)
    shown = batch()
    shuffled = Batch(shown.images[order], shown.target[order], shown.index[order])
    torch.testing.assert_close(
        loss(student.apply(lambda t: t[order]), teacher.apply(lambda t: t[order]), shuffled),
        loss(student, teacher, shown),
    )


def test_gradient_matches_finite_differences(case):
    loss, student, teacher = case
    inputs = [t.requires_grad_() for t in student.tensors()]

    def value(*tensors):
        given = iter(tensors)
        return loss(student.apply(lambda _: next(given)), teacher, batch())

    assert gradcheck(value, inputs, fast_mode=True)


def test_gradient_of_own_weights_matches_finite_differences(case):
    loss, student, teacher = case
    own = [w for w in loss.parameters() if w.requires_grad]
    if own:
        assert gradcheck(lambda *_: loss(student, teacher, batch()), own, fast_mode=True)


def test_gradient_reaches_the_student(case):
    loss, student, teacher = case
    inputs = [t.requires_grad_() for t in student.tensors()]
    gradients = torch.autograd.grad(loss(student, teacher, batch()), inputs, allow_unused=True)
    assert any(g is not None and g.norm() > 0 for g in gradients)


def test_arguments_are_never_changed(case):
    loss, student, teacher = case
    before = [t.clone() for t in student.tensors() + teacher.tensors()]
    loss(student, teacher, batch())
    after = student.tensors() + teacher.tensors()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_student_that_equals_its_teacher_loses_nothing(make):
    loss, _, teacher = make(WIDTH)
    value = loss(teacher, teacher, batch())
    assert not LOSSES[CASES[make.name][0]].info.zero or value.abs() < 1e-10


def test_half_precision_is_finite(case):
    loss, student, teacher = case
    single = loss.float()(
        *(f.apply(lambda t: t.bfloat16().float()) for f in (student, teacher)), batch()
    )
    assert single.isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(
            student.apply(lambda t: t.bfloat16()), teacher.apply(lambda t: t.bfloat16()), batch()
        )
    assert value.isfinite()


def test_a_saved_loss_is_the_same_loss(make):
    first, student, teacher = make(WIDTH)
    second, _, _ = make(WIDTH)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(
        first(student, teacher, batch()), second(student, teacher, batch()), rtol=0, atol=0
    )


def trained_for(epochs, loss, student, teacher):
    """The values of some epochs of one step, in which a loss's own weights learn along."""
    own = [weight for weight in loss.parameters() if weight.requires_grad]
    values = []
    for epoch in epochs:
        loss.train().on_epoch_start(epoch)
        value = loss(student, teacher, batch())
        values.append(value.detach())
        gradients = torch.autograd.grad(value, own, allow_unused=True) if own else ()
        with torch.no_grad():
            for weight, gradient in zip(own, gradients, strict=True):
                weight -= 0 if gradient is None else 0.1 * gradient
    return values


def test_a_resumed_loss_goes_on_to_the_same_values(make):
    first, student, teacher = make(WIDTH)
    inputs = student.apply(lambda t: t.requires_grad_()), teacher
    trained_for([1, 2], first, *inputs)
    second, _, _ = make(WIDTH)
    second.load_state_dict(first.state_dict())
    assert trained_for([3, 4], second, *inputs) == trained_for([3, 4], first, *inputs)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # inside torch
@pytest.mark.parametrize("make", LOSSES, indirect=True)
def test_a_compiled_loss_is_the_same_loss(make):
    torch.compiler.reset()  # or graphs of other losses count, of which only so many are kept
    loss, student, teacher = make(WIDTH)
    inputs = [t.requires_grad_() for t in student.tensors()]
    made = []
    for compared in (loss, torch.compile(loss, backend="aot_eager")):
        value = compared(student, teacher, batch())
        made.append([value, *torch.autograd.grad(value, inputs, allow_unused=True)])
    torch.testing.assert_close(*made, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_catalog_tells_what_a_loss_compares_and_whose_it_is(name):
    info = LOSSES[name].info
    assert info.name == name
    assert info.compares
    assert info.paper
    assert info.url in LOSSES[name].__doc__
    assert info.cost


def test_only_cross_entropy_needs_no_teacher():
    assert [name for name, entry in LOSSES.items() if not entry.needs_teacher] == ["ce"]
