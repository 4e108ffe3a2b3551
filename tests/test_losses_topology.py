"""TopKD: the definition in plain loops, and the approximators that are learned for it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import homology, topological_losses
from reference import losses as reference
from reference import topology as reference_topology
from reference.clouds import polygon
from reference.features import (
    CLOUD,
    IMAGES,
    Recorder,
    answers,
    batch,
    bound,
    features,
    never,
    source_in,
)
from torch.autograd import gradcheck

from topkd.features import Batch, Features
from topkd.losses import TopKD
from topkd.losses.approximators import learn
from topkd.losses.controls import batch_tree
from topkd.topology import PersistenceImage, PersistenceVector, RipsNet
from topkd.topology.approximation import Approximation, Training
from topkd.topology.serialization import to_json

SHORT = Training(passes=2, epochs=2)
RING = 12  # points of a cloud that has loops


@pytest.fixture
def source(tmp_path):
    return source_in(tmp_path)


# --- TopKD, exact --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vector", "image"])
@pytest.mark.parametrize("width", [5, 9])
def test_exact_topkd_is_the_definition_in_plain_loops(source, form, width):
    student, teacher = features(width, seed=1), features(5, seed=2)
    loss = bound(TopKD, student, teacher, source, form=form)
    fitted = loss.metadata()["vectorization"]
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
    loss = bound(TopKD, features(3, seed=1), features(5, seed=2), source, form=form)
    fitted = loss.metadata()["vectorization"]
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
    loss = bound(TopKD, features(3, seed=1), features(5, seed=2), source)
    assert loss.metadata()["via"] == "exact"
    assert loss.metadata()["vectorization"]["form"] == "vector"
    assert not list(loss.parameters())
    assert not list(source.folder.iterdir())


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "image"}, *({"via": v, "training": SHORT} for v in ("ripsnet", "distancenet"))],
)
def test_topkd_does_not_see_which_image_is_which(source, options):
    student, teacher = features(5, seed=1), features(5, seed=2)
    loss = bound(TopKD, student, teacher, source, **options).double()
    permuted = student.apply(lambda t: t.flip(0))
    torch.testing.assert_close(loss(permuted, teacher, batch()), loss(student, teacher, batch()))


# --- Other dimensions, scales and edges ----------------------------------------------------------


def rings(epoch):
    """A teacher's answers that hold loops: a batch is a circle and what lies within."""
    for number in range(8):
        yield batch(RING), circle(seed=100 * epoch + number)


def circle(seed, size=1.0):
    noise = torch.randn(RING, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = torch.cat([polygon(RING - 2), torch.zeros(2, 2)]) + 0.1 * noise
    return Features(torch.zeros(RING, 4), size * points)


def bars_of(cloud, dimension, scale):
    """Scaled by the deaths of dimension 0."""
    points = cloud.embedding.tolist()
    found = homology.diagrams([[math.dist(a, b) for b in points] for a in points], dimension)
    divisor = reference_topology.scale_of(scale, [death for _, death in found[0]])
    return [(birth / divisor, death / divisor) for birth, death in found[dimension]]


@pytest.mark.parametrize("scale", [None, "none", "tree_mean", "tree_median", "tree_max"])
def test_the_vector_of_loops_is_the_definition_in_plain_loops(source, scale):
    source = replace(source, teacher_batches=rings)
    student, teacher = circle(seed=1), circle(seed=2, size=1.2)
    loss = bound(TopKD, student, teacher, source, dimension=1, scale=scale)
    facts = loss.metadata()
    assert (facts["dimension"], facts["scale"]) == (1, scale or "tree_mean")
    fitted = facts["vectorization"]
    assert fitted.pop("form") == "vector"
    each = [bars_of(made, 1, facts["scale"]) for _, made in rings(0)]
    greatest = max(death - birth for bars in each for birth, death in bars)
    assert fitted["persistences"] == pytest.approx((0.0, greatest * 20 / 17))

    def describe(cloud):
        lives = [death - birth for birth, death in bars_of(cloud, 1, facts["scale"])]
        return reference_topology.vector(lives, **fitted)

    expected = reference.mean_square(describe(student), describe(teacher))
    assert expected > 0
    assert loss(student, teacher, batch(RING)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [None, "tree_median"])
def test_the_image_of_loops_is_the_definition_in_plain_loops(source, scale):
    source = replace(source, teacher_batches=rings)
    student, teacher = circle(seed=1), circle(seed=2, size=1.2)
    loss = bound(TopKD, student, teacher, source, dimension=1, form="image", scale=scale)
    facts = loss.metadata()
    assert facts["scale"] == (scale or "none")
    fitted = facts["vectorization"]
    assert (fitted.pop("form"), fitted["sampling"]) == ("image", "integral")
    assert fitted["weight"] == "persistence"  # short loops fade out
    images = [
        reference_topology.image(bars_of(cloud, 1, scale or "none"), **fitted)
        for cloud in (student, teacher)
    ]
    expected = reference.mean_square(*images)
    assert expected > 0
    assert loss(student, teacher, batch(RING)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["vector", "image"])
def test_the_gradient_of_loops_matches_finite_differences(source, form):
    student, teacher = circle(seed=1), circle(seed=2)
    loss = bound(
        TopKD,
        student,
        teacher,
        replace(source, teacher_batches=rings),
        dimension=1,
        form=form,
        scale="tree_mean",
    )

    def of(points):
        return loss(Features(student.logits, points), teacher, batch(RING))

    assert gradcheck(of, [student.embedding.requires_grad_()], fast_mode=True)
    assert torch.autograd.grad(of(student.embedding), student.embedding)[0].norm() > 0


@pytest.mark.parametrize("form", ["vector", "image"])
@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("scale", ["none", "tree_mean", "tree_median", "tree_max"])
def test_a_scale_takes_the_size_of_a_cloud_away(source, form, dimension, scale):
    student, teacher = circle(seed=1), circle(seed=2)
    options = {"form": form, "dimension": dimension, "scale": scale}
    loss = bound(TopKD, student, teacher, replace(source, teacher_batches=rings), **options)
    assert loss.metadata()["scale"] == scale
    values = [loss(circle(seed=1, size=s), teacher, batch(RING)).item() for s in (1.0, 1.1)]
    assert (values[0] == pytest.approx(values[1], rel=1e-6)) == (scale != "none")


@pytest.mark.parametrize("scale", ["none", "tree_mean", "tree_max"])
def test_a_scaled_image_is_the_definition_in_plain_loops(source, scale):
    student, teacher = features(3, seed=1), features(5, seed=2)
    loss = bound(TopKD, student, teacher, source, form="image", scale=scale)
    fitted = loss.metadata()["vectorization"]
    assert fitted.pop("form") == "image"
    diagrams = []
    for _, made in answers(0):
        deaths = reference_topology.deaths(made.embedding.tolist())
        divisor = reference_topology.scale_of(scale, deaths)
        diagrams.append([(0.0, death / divisor) for death in deaths])
    for name, value in reference_topology.fit_image(diagrams).items():
        assert fitted[name] == pytest.approx(value, rel=1e-4)
    images = []
    for cloud in (student, teacher):
        deaths = reference_topology.deaths(cloud.embedding.tolist())
        images.append(reference_topology.image([(0.0, death) for death in deaths], **fitted))
    found = loss(student, teacher, batch()).item()
    assert found == pytest.approx(reference.mean_square(*images), rel=1e-5)


@pytest.mark.parametrize("form", ["vector", "image"])
def test_random_edges_are_described_as_a_tree_would_be(source, form):
    student, teacher = features(3, seed=1), features(5, seed=2)
    loss = bound(TopKD, student, teacher, source, form=form, edges="random")
    fitted = loss.metadata()["vectorization"]
    assert fitted.pop("form") == form

    def lengths(cloud, shown, epoch):
        tree = batch_tree(shown, epoch).tolist()
        return topological_losses.lengths(cloud.embedding.tolist(), tree)

    diagrams = [lengths(made, shown, 0) for shown, made in answers(0)]
    if form == "vector":  # what is fitted is fitted on trees like these
        expected = reference_topology.fit_vector(diagrams)
        describe = reference_topology.vector
    else:
        bars = [[(0.0, length) for length in sorted(each)] for each in diagrams]
        expected = reference_topology.fit_image(bars)

        def describe(each, **fitted):
            return reference_topology.image([(0.0, length) for length in each], **fitted)

    for name, value in expected.items():
        assert fitted[name] == pytest.approx(value, rel=1e-4)
    for epoch in (1, 2):
        loss.on_epoch_start(epoch)
        described = [describe(lengths(c, batch(), epoch), **fitted) for c in (student, teacher)]
        value = loss(student, teacher, batch()).item()
        assert value == pytest.approx(reference.mean_square(*described), rel=1e-5)


def test_approximators_learn_loops_too(source):
    source = replace(source, teacher_batches=many_rings, target=torch.zeros(8 * RING))
    student, teacher = circle(seed=1), circle(seed=2)
    for via in ("ripsnet", "distancenet"):
        options = {"via": via, "training": SHORT, "dimension": 1, "scale": "tree_mean"}
        loss = bound(TopKD, student, teacher, source, **options).double()
        assert loss(student, teacher, batch(RING)).isfinite()
        (path,) = source.folder.glob(f"{via}-*.safetensors")
        exact = Approximation.from_bytes(path.read_bytes()).exact
        assert (exact.dimension, exact.scale, exact.vectorization.scale) == (1, "tree_mean", "none")
        assert not getattr(loss.describe, "scale_aware", False)
        del options["training"]
        again = bound(TopKD, student, teacher, source, file=str(path), **options).double()
        assert again(student, teacher, batch(RING)) == loss(student, teacher, batch(RING))
        with pytest.raises(ValueError, match="was trained for dimension 1, not for dimension: 0"):
            bound(TopKD, student, teacher, source, file=str(path), via=via)
        other = {"ripsnet": "distancenet", "distancenet": "ripsnet"}[via]
        with pytest.raises(ValueError, match=f"holds a {via}, not via: {other}"):
            bound(TopKD, student, teacher, source, file=str(path), **options | {"via": other})
        with pytest.raises(ValueError, match="trained for form: .*, not for form: entropy"):
            bound(TopKD, student, teacher, source, file=str(path), **options, form="entropy")
        with pytest.raises(
            ValueError, match="was trained at scale: tree_mean, not at scale: tree_max"
        ):
            bound(
                TopKD, student, teacher, source, file=str(path), **options | {"scale": "tree_max"}
            )


def many_rings(epoch):
    for number, (_, made) in enumerate(rings(epoch)):
        index = number * RING + torch.arange(RING)
        shown = Batch(torch.zeros(RING, 3, 8, 8), index % 4, index)
        yield shown, made.apply(lambda t: t.float())


@pytest.mark.parametrize("change", [{"dimension": 1}, {"scale": "tree_max"}])
def test_other_dimensions_and_scales_make_another_approximator(source, change):
    source = replace(source, teacher_batches=many_rings, target=torch.zeros(8 * RING))
    for options in ({}, change):
        learn(source, RING, "image", "ripsnet", SHORT, **options)
    assert len(list(source.folder.glob("ripsnet-*.safetensors"))) == 2


# --- TopKD by RipsNet ----------------------------------------------------------------------------


def by_ripsnet(source, width=5, **options):
    own = {} if "file" in options else {"training": SHORT}
    networks = features(width, seed=1), features(5, seed=2)
    return bound(TopKD, *networks, source, via="ripsnet", **own | options)


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

    def instead(stream, held_out, vectorization, training, **options):
        seen.update(held_out=held_out, epochs=[stream(epoch) for epoch in (1, 2, 3)])
        return RipsNet(5).eval()

    monkeypatch.setattr("topkd.losses.approximators.train", instead)
    learn(replace(source, teacher_batches=marked), CLOUD, "image", "ripsnet", SHORT)

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


def test_the_projection_is_the_same_whether_ripsnet_is_trained_or_loaded(source):
    begun = []
    for _ in range(2):
        torch.manual_seed(7)
        begun.append(by_ripsnet(source, width=3).project.weight)
    assert torch.equal(*begun)
    torch.manual_seed(7)
    assert torch.equal(begun[0], torch.nn.Linear(3, 5).weight)


def test_ripsnet_is_trained_once(source):
    first = by_ripsnet(source)
    again = by_ripsnet(replace(source, teacher_batches=never))
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
    by_ripsnet(replace(source, teacher_hash="another"))
    assert len(list(source.folder.glob("ripsnet-*.safetensors"))) == 2


def test_facts_tell_how_good_the_ripsnet_is(source):
    facts = by_ripsnet(source).metadata()
    saved = Approximation.from_bytes(the_file(source).read_bytes())
    assert facts["via"] == "ripsnet"
    assert facts["vectorization"] == to_json(saved.exact.vectorization)
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
        learned = learn(source, CLOUD, form, "ripsnet", SHORT)
        assert isinstance(learned.exact.vectorization, kind)
        assert learned.network.outputs == learned.exact.vectorization.size


def test_distancenet_needs_no_projection(source):
    loss = bound(
        TopKD,
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
        Approximation.from_bytes(path.read_bytes()).exact.vectorization, PersistenceVector
    )


def test_a_ripsnet_file_is_used_as_it_is(source, tmp_path):
    by_ripsnet(source)
    elsewhere = replace(source, folder=tmp_path / "elsewhere", teacher_batches=never)
    loss = by_ripsnet(elsewhere, file=str(the_file(source))).double()
    assert loss(features(5, seed=1), features(5, seed=1), batch()) == 0
    assert not elsewhere.folder.exists()


def test_a_ripsnet_of_another_teacher_is_refused(source):
    by_ripsnet(source)
    path = str(the_file(source))
    with pytest.raises(ValueError, match=r"ripsnet-.*trained for another teacher, a teach"):
        by_ripsnet(replace(source, teacher_hash="somebody else"), file=path)


def test_a_ripsnet_of_other_clouds_is_refused(source):
    by_ripsnet(source)
    with pytest.raises(ValueError, match="trained for clouds of 6 points, not for batches of 7"):
        bound(
            TopKD,
            features(5, seed=1, n=7),
            features(5, seed=2, n=7),
            source,
            via="ripsnet",
            file=str(the_file(source)),
        )


def test_another_file_is_refused_by_name(source, tmp_path):
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not an approximator file of this version"):
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
        learn(
            replace(source, teacher_batches=few, target=torch.zeros(CLOUD + 1)),
            CLOUD,
            form,
            "ripsnet",
            SHORT,
        )
