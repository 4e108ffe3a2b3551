"""One contract for every loss of the catalogue, an oracle for each, and what TopKD learns."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import losses as reference
from reference import topology as reference_topology
from torch.autograd import gradcheck

from topkd.features import Batch, Features
from topkd.losses import LOSSES, CrossEntropy, Distillation, Source, TopKD, distillation
from topkd.losses.topology import learn
from topkd.progress import Progress
from topkd.topology import PersistenceImage, PersistenceVector, RipsNet
from topkd.topology.approximation import Approximation, Training
from topkd.topology.stored import to_json

CLOUD, IMAGES, CLASSES = 6, 48, 4
SHORT = Training(passes=2, epochs=2)


def features(width, seed, n=CLOUD):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, CLASSES, dtype=torch.float64, generator=generator)
    embedding = torch.randn(n, width, dtype=torch.float64, generator=generator)
    maps = [torch.randn(n, 1, 2, 2, dtype=torch.float64, generator=generator)]
    return Features(logits, embedding, maps)


def batch(n=CLOUD):
    return Batch(torch.zeros(n, 3, 8, 8), torch.arange(n) % CLASSES, torch.arange(n))


def answers(epoch, width=5):
    """A teacher's answers to all images, batch by batch, in an order of each epoch's own."""
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
    for index in order.split(CLOUD):
        made = features(width, seed=1000 * epoch + int(index[0]))
        shown = Batch(torch.zeros(CLOUD, 3, 8, 8), index % CLASSES, index)
        size = 1 + int(index[0]) / IMAGES  # so that clouds differ
        yield shown, Features(made.logits.float(), size * made.embedding.float())


def never(epoch):
    raise AssertionError("the teacher was asked again")


class Recorder(Progress):
    """Keeps what is said; stops the work, as Ctrl-C does, when a bar has advanced so often."""

    def __init__(self, stop_at=math.inf, bar="RipsNet"):
        super().__init__(quiet=True)
        self.said, self.stop_at, self.of = [], stop_at, bar

    def say(self, text):
        self.said.append(text)

    @contextmanager
    def bar(self, title, total, unit):
        steps = 0

        def advance(amount, news):
            nonlocal steps
            steps += 1
            if title == self.of and steps >= self.stop_at:
                raise KeyboardInterrupt

        yield advance


@pytest.fixture
def source(tmp_path):
    return Source(answers, IMAGES, "a teacher", tmp_path, Recorder())


# --- The contract --------------------------------------------------------------------------------

CASES = {name: (name, {}) for name in LOSSES} | {
    "ce, smoothed": ("ce", {"label_smoothing": 0.2}),
    "kd, hot": ("kd", {"temperature": 20.0}),
    "topkd, exact image": ("topkd", {"form": "image"}),
    "topkd, RipsNet": ("topkd", {"via": "ripsnet", "training": SHORT}),
    "topkd, RipsNet of vectors": ("topkd", {"via": "ripsnet", "form": "vector", "training": SHORT}),
    "topkd, DistanceNet": ("topkd", {"via": "distancenet", "training": SHORT}),
}
WIDTHS = {"same width": 5, "narrower": 3}


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory):
    """One for the whole contract, so that each RipsNet is trained once."""
    return Source(answers, IMAGES, "a teacher", tmp_path_factory.mktemp("shared"), Recorder())


@pytest.fixture(params=CASES)
def make(request, shared_source):
    """Builds one loss for a student of some width."""
    name, options = CASES[request.param]

    def build(width):
        student, teacher = features(width, seed=1), features(5, seed=2)
        loss = LOSSES[name].loss.between(student, teacher, shared_source, **options)
        return loss.double(), student, teacher

    build.name = name
    return build


@pytest.fixture(params=WIDTHS.values(), ids=WIDTHS)
def case(request, make):
    return make(request.param)


def test_value_is_a_finite_scalar(case):
    loss, student, teacher = case
    value = loss(student, teacher, batch())
    assert value.shape == ()
    assert value.isfinite()
    assert value >= 0
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
    assert gradcheck(lambda z, e, *m: loss(Features(z, e, list(m)), teacher, batch()), inputs)


def test_gradient_of_own_weights_matches_finite_differences(case):
    loss, student, teacher = case
    own = [w for w in loss.parameters() if w.requires_grad]
    if own:
        assert gradcheck(lambda *_: loss(student, teacher, batch()), own)


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
    loss, _, teacher = make(5)
    value = loss(teacher, teacher, batch())
    assert make.name == "ce" or value.abs() < 1e-12


def test_half_precision_is_near(case):
    loss, student, teacher = case
    whole = loss(student, teacher, batch())
    single = loss.float()(
        student.apply(lambda t: t.bfloat16().float()),
        teacher.apply(lambda t: t.bfloat16().float()),
        batch(),
    )
    torch.testing.assert_close(single.double(), whole, rtol=0.2, atol=0.02)


def test_a_saved_loss_is_the_same_loss(make):
    first, student, teacher = make(3)
    second, _, _ = make(3)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(
        first(student, teacher, batch()), second(student, teacher, batch()), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_catalogue_tells_what_a_loss_compares_and_whose_it_is(name):
    entry = LOSSES[name]
    assert entry.compares
    assert entry.paper
    assert "https://" in entry.loss.__doc__


def test_only_cross_entropy_needs_no_teacher():
    assert [name for name, entry in LOSSES.items() if not entry.loss.needs_teacher] == ["ce"]


# --- Logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_the_paper_in_plain_loops(smoothing):
    student, shown = features(3, seed=1), batch()
    found = CrossEntropy(label_smoothing=smoothing)(student, student, shown)
    expected = reference.cross_entropy(student.logits.tolist(), shown.target.tolist(), smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_of_a_guess_is_the_logarithm_of_the_classes():
    nothing = Features(torch.zeros(CLOUD, CLASSES), torch.zeros(CLOUD, 1))
    for smoothing in (0.0, 0.5):
        value = CrossEntropy(label_smoothing=smoothing)(nothing, nothing, batch())
        assert value.item() == pytest.approx(math.log(CLASSES))


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0, math.nan])
def test_refuses_a_smoothing_that_is_no_share(value):
    with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 1\), got {value}"):
        CrossEntropy(label_smoothing=value)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_paper_in_plain_loops(temperature):
    student, teacher = features(3, seed=1), features(5, seed=2)
    found = Distillation(temperature=temperature)(student, teacher, batch())
    expected = reference.distillation(student.logits.tolist(), teacher.logits.tolist(), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_distillation_of_two_classes_is_known():
    # p = (3/4, 1/4) against (1/2, 1/2): ln 2 minus the entropy of p.
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation(student, teacher, temperature=1.0).item() == pytest.approx(expected)


def test_hot_distillation_compares_centred_logits():
    # Hinton et al., section 2.1: for great T the gradient is that of the squared difference.
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = gap.square().sum() / (2 * CLASSES * CLOUD)
    torch.testing.assert_close(
        distillation(student, teacher, temperature=1e4), expected, rtol=1e-3, atol=0
    )


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_distillation_sees_only_differences_of_logits(a, b):
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    torch.testing.assert_close(
        distillation(student + a, teacher + b), distillation(student, teacher)
    )


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_refuses_a_temperature_that_is_not_positive(value):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {value}"):
        Distillation(temperature=value)


def test_refuses_logits_of_other_shapes():
    with pytest.raises(ValueError, match=r"logits differ: student \(6, 4\), teacher \(6, 5\)"):
        distillation(torch.zeros(6, 4), torch.zeros(6, 5))


# --- TopKD, exact --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vector", "image"])
@pytest.mark.parametrize("width", [5, 9])
def test_exact_topkd_is_the_definition_in_plain_loops(source, form, width):
    student, teacher = features(width, seed=1), features(5, seed=2)
    loss = TopKD.between(student, teacher, source, form=form)
    fitted = loss.facts()["vectorisation"]
    assert fitted.pop("form") == form

    def describe(cloud):
        deaths = reference_topology.deaths(cloud.tolist())
        if form == "vector":
            return reference_topology.vector(deaths, **fitted)
        return reference_topology.image([(0.0, death) for death in deaths], **fitted)

    expected = reference.mean_square(describe(student.embedding), describe(teacher.embedding))
    assert expected > 0
    assert loss(student, teacher, batch()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("form", "kind"), [("vector", "vector"), ("image", "image")])
def test_exact_topkd_is_fitted_on_clouds_of_the_teacher(source, form, kind):
    loss = TopKD.between(features(3, seed=1), features(5, seed=2), source, form=form)
    fitted = loss.facts()["vectorisation"]
    clouds = [made.embedding.tolist() for _, made in answers(0)]
    if kind == "vector":
        diagrams = [reference_topology.deaths(cloud) for cloud in clouds]
        expected = reference_topology.fit_vector(diagrams)
    else:
        diagrams = [[(0.0, d) for d in reference_topology.deaths(cloud)] for cloud in clouds]
        expected = reference_topology.fit_image(diagrams)
    for name, value in expected.items():
        assert fitted[name] == pytest.approx(value, rel=1e-4)


def test_exact_topkd_is_the_default_and_has_no_weights(source):
    loss = TopKD.between(features(3, seed=1), features(5, seed=2), source)
    assert loss.facts()["via"] == "exact"
    assert loss.facts()["vectorisation"]["form"] == "vector"
    assert not list(loss.parameters())
    assert not list(source.folder.iterdir())


@pytest.mark.parametrize("make", [c for c in CASES if c.startswith("topkd")], indirect=True)
def test_topkd_does_not_see_which_image_is_which(make):
    loss, student, teacher = make(5)
    permuted = student.apply(lambda t: t.flip(0))
    torch.testing.assert_close(loss(permuted, teacher, batch()), loss(student, teacher, batch()))


# --- TopKD by RipsNet ----------------------------------------------------------------------------


def by_ripsnet(source, width=5, **options):
    return TopKD.between(
        features(width, seed=1),
        features(5, seed=2),
        source,
        via="ripsnet",
        **{"training": SHORT} | options,
    )


def the_file(source):
    (path,) = source.folder.glob("ripsnet-*.safetensors")
    return path


def in_numpy(network, points):
    weights = {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}
    x = points
    for layer in range(1, 8):
        if layer == 4:
            x = x.mean(0)
        x = x @ weights[f"layer{layer}.linear.weight"].T
        x = x + weights.get(f"layer{layer}.linear.bias", 0)
        x = np.maximum(x, 0) if layer < 7 else 1 / (1 + np.exp(-x))
    return x


@pytest.mark.parametrize("width", [5, 3, 9])
def test_topkd_by_ripsnet_is_the_paper(source, width):
    loss = by_ripsnet(source, width).double()
    student, teacher = features(width, seed=1), features(5, seed=2)
    network = Approximation.from_bytes(the_file(source).read_bytes()).network
    points = student.embedding.numpy()
    if width != 5:  # a linear map with bias takes the student to the teacher's width
        matrix, bias = (w.detach().numpy() for w in loss.project.parameters())
        points = points @ matrix.T + bias
    gap = in_numpy(network, points) - in_numpy(network, teacher.embedding.numpy())
    assert gap.shape == (400,)
    value = loss(student, teacher, batch()).item()
    assert value == pytest.approx((gap**2).mean(), rel=1e-9)


def test_images_that_judge_a_ripsnet_are_in_no_cloud_that_trains_it(source, monkeypatch):
    def marked(epoch):  # the embedding of an image is its number, and which pass it is from
        for shown, made in answers(epoch):
            embedding = torch.zeros(CLOUD, 5)
            embedding[:, 0], embedding[:, 1] = shown.index, epoch
            yield shown, replace(made, embedding=embedding)

    seen = {}

    def instead(stream, held_out, vectorisation, training, **options):
        seen.update(held_out=held_out, epochs=[stream(epoch) for epoch in (1, 2, 3)])
        return RipsNet(5).eval()

    monkeypatch.setattr("topkd.losses.topology.train", instead)
    learn(replace(source, answers=marked), CLOUD, "image", "ripsnet", SHORT)

    def images(clouds):
        return set(clouds[..., 0].flatten().tolist())

    judging, training = images(seen["held_out"]), set.union(*map(images, seen["epochs"]))
    assert not judging & training
    assert len(judging) >= 2 * CLOUD - 1
    assert len(judging | training) > 0.9 * IMAGES
    for clouds in seen["epochs"]:
        points = clouds.flatten(0, 1).tolist()
        assert len(set(map(tuple, points))) == len(points)  # each answer of the teacher once
        assert set(clouds[..., 1].flatten().tolist()) == {0, 1}  # of both passes
        assert (clouds[..., 1].std(1) == 0).all()  # and no cloud of two: augmented twins
    assert not torch.equal(*seen["epochs"][:2])


def test_only_the_projection_is_trained(source):
    def trained(loss):
        return [name for name, w in loss.named_parameters() if w.requires_grad]

    assert trained(by_ripsnet(source)) == []
    assert trained(by_ripsnet(source, width=3)) == ["project.weight", "project.bias"]


def test_ripsnet_is_trained_once(source):
    first = by_ripsnet(source)
    again = by_ripsnet(replace(source, answers=never))
    assert torch.equal(*(next(iter(loss.state_dict().values())) for loss in (first, again)))


@pytest.mark.parametrize(
    "change",
    [
        {"training": replace(SHORT, epochs=3)},
        {"training": replace(SHORT, pooling="sum")},
        {"training": replace(SHORT, passes=1)},
        {"form": "vector"},
    ],
)
def test_other_options_make_another_ripsnet(source, change):
    by_ripsnet(source)
    by_ripsnet(source, **change)
    assert len(list(source.folder.glob("ripsnet-*.safetensors"))) == 2


def test_another_teacher_makes_another_ripsnet(source):
    by_ripsnet(source)
    by_ripsnet(replace(source, teacher="another"))
    assert len(list(source.folder.glob("ripsnet-*.safetensors"))) == 2


def test_facts_tell_how_good_the_ripsnet_is(source):
    facts = by_ripsnet(source).facts()
    saved = Approximation.from_bytes(the_file(source).read_bytes())
    assert facts["via"] == "ripsnet"
    assert facts["vectorisation"] == to_json(saved.exact.vectorisation)
    assert facts["fidelity"] == vars(saved.fidelity)
    assert saved.fidelity.clouds >= 256
    assert saved.cloud_size == CLOUD
    assert saved.teacher == "a teacher"


def test_a_poor_ripsnet_is_said_to_be_poor(source):
    by_ripsnet(source)
    assert any("R²" in line for line in source.progress.said)
    assert any(line.startswith("warning: this RipsNet explains") for line in source.progress.said)


def test_form_chooses_what_ripsnet_learns(source):
    for form, kind in (("image", PersistenceImage), ("vector", PersistenceVector)):
        learnt = learn(source, CLOUD, form, "ripsnet", SHORT)
        assert isinstance(learnt.exact.vectorisation, kind)
        assert learnt.network.outputs == learnt.exact.vectorisation.size


def test_distancenet_needs_no_projection(source):
    loss = TopKD.between(
        features(3, seed=1),
        features(5, seed=2),
        source,
        via="distancenet",
        training=SHORT,
    ).double()
    assert loss.project is None
    assert loss(features(3, seed=1), features(5, seed=2), batch()).isfinite()
    (path,) = source.folder.glob("distancenet-*.safetensors")
    assert isinstance(
        Approximation.from_bytes(path.read_bytes()).exact.vectorisation, PersistenceVector
    )


def test_a_ripsnet_file_is_used_as_it_is(source, tmp_path):
    by_ripsnet(source)
    elsewhere = replace(source, folder=tmp_path / "elsewhere", answers=never)
    loss = by_ripsnet(elsewhere, file=str(the_file(source))).double()
    assert loss(features(5, seed=1), features(5, seed=1), batch()) == 0
    assert not elsewhere.folder.exists()


def test_a_ripsnet_of_another_teacher_is_refused(source):
    by_ripsnet(source)
    path = str(the_file(source))
    with pytest.raises(ValueError, match=r"ripsnet-.*made for another teacher: it learnt a teach"):
        by_ripsnet(replace(source, teacher="somebody else"), file=path)


def test_a_ripsnet_of_other_clouds_is_refused(source):
    by_ripsnet(source)
    with pytest.raises(ValueError, match="made for clouds of 6 points, the batches here have 7"):
        TopKD.between(
            features(5, seed=1, n=7),
            features(5, seed=2, n=7),
            source,
            via="ripsnet",
            file=str(the_file(source)),
        )


def test_another_file_is_refused_by_name(source, tmp_path):
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="no approximator that topkd has written"):
        by_ripsnet(source, file=str(path))
    with pytest.raises(FileNotFoundError, match="absent"):
        by_ripsnet(source, file=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("bar", "stop_at"), [("Clouds", 3), ("RipsNet", 3), ("RipsNet", 11), ("RipsNet", 25)]
)
def test_ripsnet_is_the_same_after_an_interruption(source, tmp_path, bar, stop_at):
    training = replace(SHORT, epochs=24, patience=50)
    whole = learn(replace(source, folder=tmp_path / "whole"), CLOUD, "image", "ripsnet", training)
    stopped = replace(source, folder=tmp_path / "stopped", progress=Recorder(stop_at, bar))
    if stop_at < 25:
        with pytest.raises(KeyboardInterrupt):
            learn(stopped, CLOUD, "image", "ripsnet", training)
        assert not list(tmp_path.glob("stopped/*.safetensors"))
    again = learn(replace(stopped, progress=Recorder()), CLOUD, "image", "ripsnet", training)
    assert again.to_bytes() == whole.to_bytes()
    assert not list(tmp_path.glob("*/*.state"))


@pytest.mark.parametrize("form", ["image", "vector"])
def test_too_few_images_for_a_ripsnet_is_said(source, form):
    # Two clouds are kept back to judge it; nothing is left to learn from.
    def few(epoch):
        for shown, made in answers(epoch):
            if shown.index.max() < IMAGES:
                yield replace(shown, index=torch.arange(CLOUD)), made
                return

    with pytest.raises(ValueError, match="images"):
        learn(replace(source, answers=few, images=CLOUD + 1), CLOUD, form, "ripsnet", SHORT)
