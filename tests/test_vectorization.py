"""Every registered vectorization: fit, gradient, serialization and use in the TopKD loss."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from reference.clouds import polygon
from reference.features import batch, bound, features, source_in

from topkd.config.terms import Term
from topkd.config.validation import RecipeError
from topkd.features import Batch
from topkd.losses import TopKD
from topkd.losses.approximators import fit
from topkd.topology import (
    VECTORIZATIONS,
    DistanceNet,
    PersistenceVector,
    Training,
    Vectorization,
    VectorizationLayer,
    edge_matching,
    length_scale,
    rips,
)
from topkd.topology.scaling import (
    DiagramScale,
    DistanceScale,
    Scale,
    TreeScale,
    distance_scale,
)
from topkd.topology.serialization import from_json, to_json
from topkd.topology.vectorization import _REGISTERED
from topkd.training.check import configured

POINTS = 16
SHORT = Training(passes=1, epochs=1)


@pytest.fixture(params=sorted(VECTORIZATIONS))
def form(request):
    return request.param


def noisy_circles(clouds=8, seed=0):
    """Clouds with two loops each, (clouds, n, 2), float64."""
    generator = torch.Generator().manual_seed(seed)
    circle = polygon(POINTS // 2)
    pair = torch.cat([circle, 1.3 * circle + 5])
    noise = torch.randn(clouds, POINTS, 2, dtype=torch.float64, generator=generator)
    sizes = 1 + torch.rand(clouds, 1, 1, dtype=torch.float64, generator=generator)
    return sizes * pair + 0.05 * noise


def of_points(points, seed=0):
    made = features(points.shape[1], seed=seed, n=POINTS)
    return replace(made, embedding=points)


@pytest.fixture
def source(tmp_path):
    def teacher_batches(epoch):
        for number, points in enumerate(noisy_circles(seed=epoch)):
            index = number * POINTS + torch.arange(POINTS)
            shown = Batch(torch.zeros(POINTS, 3, 8, 8), index % 4, index)
            yield shown, of_points(points.float())

    return replace(
        source_in(tmp_path), teacher_batches=teacher_batches, target=torch.zeros(8 * POINTS)
    )


def test_all_vectorizations_are_registered():
    assert set(VECTORIZATIONS) == {
        "image",
        "vector",
        "betti",
        "landscape",
        "silhouette",
        "entropy",
    }
    assert all(kind.name == name for name, kind in VECTORIZATIONS.items())


@pytest.mark.parametrize("dimension", [0, 1])
def test_fit_and_gradient(form, dimension):
    points = noisy_circles().requires_grad_()
    exact = fit(rips(points.detach(), max_dim=dimension), form, dimension, None)
    vectors = exact(points)
    assert vectors.shape == (8, exact.vectorization.size)
    (gradient,) = torch.autograd.grad(vectors.square().sum(), points)
    assert gradient.isfinite().all()
    assert exact.is_scale_invariant == (form != "image")
    if form != "image":
        torch.testing.assert_close(exact(3 * points), vectors)
    else:  # TopKD's images depend on the size of a cloud, and that is where their gradient is
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("dimension", [0, 1])
def test_gradient_towards_another_cloud_is_not_zero(form, dimension):
    points, other = noisy_circles(1).requires_grad_(), noisy_circles(1, seed=1)
    exact = fit(rips(noisy_circles(), max_dim=dimension), form, dimension, "tree_mean")
    (gradient,) = torch.autograd.grad((exact(points) - exact(other)).square().sum(), points)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("dimension", [0, 1])
def test_serialization_round_trip(form, dimension):
    fitted = fit(rips(noisy_circles(), max_dim=dimension), form, dimension, None).vectorization
    again = from_json(json.loads(json.dumps(to_json(fitted))))
    assert (again, type(again)) == (fitted, VECTORIZATIONS[form])
    layer = VectorizationLayer(PersistenceVector((0.0, 1.0), sigma=1.0))
    layer.load_state_dict(VectorizationLayer(fitted).state_dict())
    assert layer.vectorization == fitted


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("scale", [None, "none", "tree_mean", "tree_median", "tree_max"])
def test_exact_topkd(source, form, dimension, scale):
    student = of_points(noisy_circles(1, seed=1)[0].requires_grad_())
    teacher = of_points(noisy_circles(1, seed=2)[0])
    loss = bound(TopKD, student, teacher, source, form=form, dimension=dimension, scale=scale)
    value = loss(student, teacher, batch(POINTS))
    (gradient,) = torch.autograd.grad(value, student.embedding)
    assert value > 0
    assert gradient.isfinite().all()
    assert loss(teacher, teacher, batch(POINTS)) == 0
    default = "none" if form == "image" else "tree_mean"
    assert loss.metadata()["scale"] == (scale or default)
    assert loss.metadata()["vectorization"]["form"] == form


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("via", ["ripsnet", "distancenet"])
def test_approximated_topkd(source, form, dimension, via):
    student = of_points(noisy_circles(1, seed=1)[0].requires_grad_())
    teacher = of_points(noisy_circles(1, seed=2)[0])
    options = {"via": via, "form": form, "dimension": dimension, "training": SHORT}
    loss = bound(TopKD, student, teacher, source, **options).double()
    value = loss(student, teacher, batch(POINTS))
    (gradient,) = torch.autograd.grad(value, student.embedding)
    assert value.isfinite()
    assert gradient.isfinite().all()
    size = VECTORIZATIONS[form].fit(rips(noisy_circles())).size
    assert loss.describe.outputs == size


def test_random_edges(source, form):
    student, teacher = (of_points(noisy_circles(1, seed=seed)[0]) for seed in (1, 2))
    loss = bound(TopKD, student, teacher, source, form=form, edges="random")
    assert loss(student, teacher, batch(POINTS)).isfinite()


@contextmanager
def registered_range() -> Iterator[type[Vectorization]]:
    @dataclass(frozen=True)
    class Range(Vectorization):
        """The least and the greatest death."""

        name = "range"
        resolution: int = 2
        scale: DiagramScale = "none"

        @property
        def size(self):
            return 2

        @classmethod
        def fit(cls, diagrams, *, scale="none"):
            return cls(scale=scale)

        def __call__(self, diagrams):
            deaths = diagrams.deaths / length_scale(diagrams, self.scale)[..., None]
            return torch.stack([deaths.amin(-1), deaths.amax(-1)], dim=-1)

        def masses(self, diagrams):
            return diagrams.persistence, diagrams.persistence

    try:
        yield Range
    finally:
        del _REGISTERED["range"]


@pytest.mark.parametrize("via", ["exact", "distancenet"])
def test_a_new_class_is_used_at_once(source, via):
    student, teacher = (of_points(noisy_circles(1, seed=seed)[0]) for seed in (1, 2))
    with registered_range() as kind:
        options = {"form": "range", "via": via}
        options |= {} if via == "exact" else {"training": SHORT}
        loss = bound(TopKD, student, teacher, source, **options).double()
        assert loss(student, teacher, batch(POINTS)) > 0
        assert loss.metadata()["vectorization"] == {
            "form": "range",
            "resolution": 2,
            "scale": "tree_mean",
        }
        assert from_json(to_json(kind(scale="tree_max"))) == kind(scale="tree_max")
        with (
            pytest.raises(ValueError, match="there is already a vectorization 'range'"),
            registered_range(),
        ):
            pass
        _REGISTERED["range"] = kind
    assert "range" not in VECTORIZATIONS


def test_recipes_take_every_form(form):
    term = Term(name="topkd", form=form, dimension=1, scale="tree_max")
    assert configured(term, "losses[0]").form == form


@pytest.mark.parametrize("option", [{"form": "picture"}, {"scale": "mean"}])
def test_recipes_are_refused_in_one_line(option):
    (name,) = option
    with pytest.raises(RecipeError, match=rf"^losses\[0\].*{name}.*") as caught:
        configured(Term(name="topkd", **option), "losses[0]")
    assert "\n" not in str(caught.value)


def test_unknown_forms_and_scales_are_refused():
    with pytest.raises(ValueError, match="form must be one of .*landscape.*, got 'picture'"):
        TopKD(form="picture")
    for scale in ("mean", "death_mean", "quantile", "mode"):
        with pytest.raises(ValueError, match=f"scale must be none or tree_mean .*, got {scale}"):
            TopKD(scale=scale)


# --- Scales --------------------------------------------------------------------------------------


def test_each_scale_is_one_statistic():
    points = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0)).double()
    diagrams = rips(points, max_dim=1)
    components, loops = diagrams.of(0), diagrams.of(1)
    values = {name: length_scale(components, name).item() for name in get_args(TreeScale)}
    values |= {name: distance_scale(points, name).item() for name in get_args(DistanceScale)}
    values |= {
        name: length_scale(loops, name).item()
        for name in get_args(DiagramScale)
        if name not in get_args(TreeScale)
    }
    assert set(values) == set(get_args(Scale))
    assert len(set(values.values())) == len(values)
    assert values["tree_mean"] == pytest.approx(6.0, abs=0.2)  # the documentation says so
    assert values["mean"] == pytest.approx(8.0, abs=0.2)


def test_the_tree_has_the_deaths_of_components():
    diagrams = rips(noisy_circles())
    for name in ("mean", "median", "max"):
        tree, deaths = (length_scale(diagrams, f"{kind}_{name}") for kind in ("tree", "death"))
        assert torch.equal(tree, deaths)


def test_scales_that_a_function_cannot_use_are_refused():
    points = noisy_circles()
    loops = rips(points, max_dim=1).of(1)
    with pytest.raises(ValueError, match="scale 'tree_mean' is a statistic of H0.*dimension 1"):
        length_scale(loops, "tree_mean")
    vector = PersistenceVector.fit(loops)
    with pytest.raises(ValueError, match="scale 'tree_max' is a statistic of H0.*dimension 1"):
        replace(vector, scale="tree_max")(loops)
    for name in ("mean", "quantile", "learned"):
        with pytest.raises(ValueError, match=f"scale must be one of none, .*, got '{name}'"):
            length_scale(loops, name)
    for name in ("tree_mean", "death_mean", "learned"):
        with pytest.raises(ValueError, match=f"scale must be one of none, .*, got '{name}'"):
            edge_matching(points, points, scale=name)
        with pytest.raises(ValueError, match=f"scale must be one of none, .*, got '{name}'"):
            distance_scale(points, name)


def test_distancenet_reads_the_scale_only_if_the_target_depends_on_it():
    clouds = noisy_circles().float()
    for form, expected in (("image", True), ("vector", False)):
        exact = fit(rips(clouds), form, 0, None)
        network = SHORT.build("distancenet", clouds, exact)
        assert isinstance(network, DistanceNet)
        assert network.scale_aware == expected
