"""Functions refuse what their classes refuse, in the same words."""

import inspect
import math
import re

import pytest
import torch
from torch import nn

from topkd.losses import (
    AB,
    CATKD,
    CC,
    CRD,
    CTKD,
    DIST,
    DKD,
    FT,
    KD,
    LOSSES,
    MLKD,
    NKD,
    PCE,
    TTM,
    functional,
)
from topkd.topology import PersistenceVector, rips

FUNCTIONS = {name: getattr(functional, name) for name in functional.__all__}
NAN, INF = math.nan, math.inf


def logits(n=4, classes=3):
    return torch.randn(n, classes, dtype=torch.float64)


def maps(n=4, channels=3, side=2):
    return torch.randn(n, channels, side, side, dtype=torch.float64)


def described(points):
    return PersistenceVector((0.0, 3.0), sigma=0.3)(rips(points))


LABELS = torch.tensor([0, 1, 2, 0])
BOTH_LOGITS = {"student": logits, "teacher": logits}
BOTH_MAPS = {"student": maps, "teacher": maps}
# Of each function: what makes the tensors of both networks, and all else that it needs.
CASES = {
    "activation_boundaries": ({"student": lambda n=4: [maps(n)], "teacher": lambda: [maps()]}, {}),
    "attention_transfer": (BOTH_MAPS, {}),
    "class_attention": (BOTH_MAPS, {}),
    "class_maps": ({"last": maps}, {"classifier": nn.Linear(3, 5).double()}),
    "cloud_scale": (BOTH_LOGITS, {}),
    "contrast": ({"similarity": logits}, {"log_z": 0.0, "images": 9}),
    "correlation_distillation": (BOTH_LOGITS, {}),
    "correlation_kernel": (BOTH_LOGITS, {}),
    "correlation_products": (BOTH_LOGITS, {}),
    "decoupled_distillation": (BOTH_LOGITS, {"target": LABELS}),
    "distillation": (BOTH_LOGITS, {}),
    "factor_transfer": (BOTH_MAPS, {}),
    "fsp_matrix": ({"shallow": maps, "deep": maps}, {}),
    "hard_distillation": (BOTH_LOGITS, {}),
    "hierarchical": (BOTH_MAPS, {}),
    "last_map": (BOTH_MAPS, {}),
    "mean_square": (BOTH_MAPS, {}),
    "multi_level_distillation": (BOTH_LOGITS, {}),
    "neighbor_products": (BOTH_LOGITS, {}),
    "neuron_selectivity": (BOTH_MAPS, {}),
    "normalized_distillation": (BOTH_LOGITS, {"target": LABELS}),
    "partial_distance": (
        {"student": lambda n=4: [maps(n)], "teacher": lambda: [maps()]},
        {"margins": [-torch.ones(3)]},
    ),
    "persistent_cross_entropy": (
        {"student": lambda n=4: torch.rand(n), "teacher": lambda: torch.rand(4)},
        {"bandwidth": 1.0, "tolerance": 1.0},
    ),
    "probabilistic_transfer": (BOTH_LOGITS, {}),
    "relational_angles": (BOTH_LOGITS, {}),
    "relational_distances": (BOTH_LOGITS, {}),
    "similarity_preserving": (BOTH_MAPS, {}),
    "standardized": ({"logits": logits}, {}),
    "gaussian_nll": ({"mean": maps, "teacher": maps}, {"variance": torch.ones(3)}),
    "topological_distillation": (BOTH_LOGITS, {"describe": described}),
    "transformed_teacher_matching": (BOTH_LOGITS, {}),
}


def call(name, make=lambda make: make(), **changed):
    """Calls a function with the first of its tensors made in another way, or other options."""
    tensors, rest = CASES[name]
    first, *others = tensors
    given = {first: make(tensors[first])} | {other: tensors[other]() for other in others}
    return FUNCTIONS[name](**given | rest | changed)


def changed(tensors, change):
    return [change(t) for t in tensors] if isinstance(tensors, list) else change(tensors)


def test_every_public_function_is_here():
    assert set(CASES) == set(FUNCTIONS)


@pytest.mark.parametrize("name", CASES)
def test_what_is_right_is_taken(name):
    assert call(name).isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_whole_numbers_are_refused(name):
    with pytest.raises(ValueError, match=r"must be floats.*, got torch\.int64") as caught:
        call(name, lambda make: changed(make(), lambda t: t.long()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_refused(name):
    if name == "persistent_cross_entropy":  # a student without bars is one
        pytest.skip("lifetimes of the student may be none")
    with pytest.raises(ValueError, match=r"must be .*\(0, |(same images|one point), got \(0,"):
        call(name, lambda make: make(0))


@pytest.mark.parametrize("name", [n for n, (tensors, _) in CASES.items() if len(tensors) == 2])
def test_batches_of_two_sizes_are_refused(name):
    if name == "persistent_cross_entropy":
        pytest.skip("there may be more lifetimes of one than of the other")
    if name == "topological_distillation":
        pytest.skip("what describes a cloud tells whether clouds may be of two sizes")
    with pytest.raises(ValueError, match=r"differ: |of the same images"):
        call(name, lambda make: make(5))


@pytest.mark.parametrize("name", CASES)
def test_other_dimensions_are_refused(name):
    if name in ("mean_square", "similarity_preserving"):
        pytest.skip("features of any dimensions can be compared")
    with pytest.raises(ValueError, match=r"must be .*got (torch\.float\d\d )?\("):
        call(name, lambda make: changed(make(), lambda t: t[..., None, None, None]))


POSITIVE = {0.0: "must be positive", -1.0: "must be positive", NAN: "must be positive"}
FINITE = POSITIVE | {INF: "must be positive"}
TEMPERATURE = FINITE | {
    **dict.fromkeys((1e30, 1e6, 101.0), "must be between 1e-06 and 100"),
    **dict.fromkeys((1e-30, 9e-7), "must be between 1e-06 and 100"),
}
EXPONENT = FINITE | dict.fromkeys((1e30, 9e-7), r"must be between 1e-06 and 1e\+06")
WEIGHT = {-1.0: "must not be negative", NAN: "must not be negative", INF: "must be finite"}
COUNT = {0: "must be positive", -1: "must be positive", 1.5: "must be a whole number"}
CHOICE = {"none": "must be .* or "}
# Of each option: what is refused, and the class that has it, with what that needs beside.
OPTIONS = [
    ("distillation", "temperature", TEMPERATURE, KD),
    ("correlation_distillation", "temperature", TEMPERATURE, DIST),
    ("correlation_distillation", "beta", WEIGHT, DIST),
    ("correlation_distillation", "gamma", WEIGHT, DIST),
    ("correlation_distillation", "damping", WEIGHT, DIST),
    ("transformed_teacher_matching", "exponent", EXPONENT, TTM),
    ("decoupled_distillation", "temperature", TEMPERATURE, DKD),
    ("decoupled_distillation", "alpha", WEIGHT, DKD),
    ("decoupled_distillation", "beta", WEIGHT, DKD),
    ("normalized_distillation", "temperature", TEMPERATURE, NKD),
    ("normalized_distillation", "gamma", WEIGHT, NKD),
    ("multi_level_distillation", "views", {3: "must be 1 or 2"}, MLKD),
    ("multi_level_distillation", "temperatures", {(): "must be at least one"}, MLKD),
    ("contrast", "temperature", TEMPERATURE, CRD),
    ("contrast", "images", COUNT, None),
    ("correlation_kernel", "gamma", FINITE, CC),
    ("correlation_kernel", "order", COUNT, CC),
    ("probabilistic_transfer", "epsilon", FINITE, None),
    ("activation_boundaries", "margin", FINITE, AB),
    ("class_attention", "resolution", COUNT, CATKD),
    ("attention_transfer", "form", CHOICE, LOSSES["at"]),
    ("factor_transfer", "form", CHOICE, FT),
    ("fsp_matrix", "pooling", CHOICE, LOSSES["fsp"]),
    (
        "persistent_cross_entropy",
        "form",
        CHOICE,
        lambda **options: PCE(bandwidth=1.0, tolerance=1.0, **options),
    ),
    (
        "persistent_cross_entropy",
        "bandwidth",
        FINITE,
        lambda bandwidth: PCE(bandwidth=bandwidth, tolerance=1.0),
    ),
    (
        "persistent_cross_entropy",
        "tolerance",
        FINITE,
        lambda tolerance: PCE(bandwidth=1.0, tolerance=tolerance),
    ),
]


@pytest.mark.parametrize(
    ("name", "option", "value", "message", "build"),
    [
        pytest.param(name, option, value, message, build, id=f"{name} {option} {value}")
        for name, option, refused, build in OPTIONS
        for value, message in refused.items()
    ],
)
def test_functions_and_classes_refuse_the_same(name, option, value, message, build):
    works = [lambda: call(name, **{option: value})]
    if build is not None:
        works.append(lambda: build(**{option: value}))
    pattern = rf"^{option} {message}.*, got {re.escape(str(value))}$"
    for work in works:
        with pytest.raises(ValueError, match=pattern):
            work()


def test_every_option_with_a_range_is_here():
    seen = {(name, option) for name, option, *_ in OPTIONS}
    for name, function in FUNCTIONS.items():
        for option, told in inspect.signature(function).parameters.items():
            flag = told.annotation in ("bool", bool)
            if told.kind is inspect.Parameter.KEYWORD_ONLY and not flag:
                assert (name, option) in seen, (name, option)


@pytest.mark.parametrize("name", ["decoupled_distillation", "normalized_distillation"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([0, 1, 3, 0], "labels must be 0 to 2, got 3"),
        ([0, -1, 2, 0], "labels must be 0 to 2, got -1"),
        ([0, 1, 2], r"labels must be whole numbers \(4,\), got torch.int64 \(3,\)"),
        ([0.0, 1.0, 2.0, 0.0], r"labels must be whole numbers \(4,\), got torch.float32 \(4,\)"),
    ],
)
def test_labels_out_of_range_are_refused(name, target, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call(name, target=torch.tensor(target))


def test_temperatures_that_are_tensors_are_looked_at():
    assert call("distillation", temperature=torch.tensor(4.0)).isfinite()
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        call("distillation", temperature=torch.tensor(0.0))


def test_variances_and_margins_are_those_of_the_channels():
    with pytest.raises(ValueError, match=r"the variance must be of each channel, \(3,\), got \(2,"):
        call("gaussian_nll", variance=torch.ones(2))
    with pytest.raises(ValueError, match=r"the least variance must be positive, got 0\.0"):
        call("gaussian_nll", variance=torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"margins must be of each channel, \[\(3,\)\], got \[\]"):
        call("partial_distance", margins=[])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CTKD(lowest=1e30), "lowest must be between"),
        (lambda: CTKD(spread=1e30), r"lowest \+ spread must be between"),
        (lambda: CTKD(rise=1.5), "rise must be a whole number, got 1.5"),
        (lambda: CRD(size=1.5), "size must be a whole number, got 1.5"),
        (lambda: LOSSES["ultrametric"](order=INF), "order must be finite, got inf"),
        (lambda: LOSSES["ultrametric"](scale="big"), "scale must be none or mean or"),
        (lambda: LOSSES["rtd_lite"](scale="big"), "scale must be none or mean or"),
        (lambda: LOSSES["edge_matching"](scale="big"), "scale must be none or mean or"),
        (lambda: LOSSES["wasserstein"](scale="mean"), "scale must be none or tree_mean or"),
        (lambda: LOSSES["wasserstein"](dimension=2), "dimension must be 0 or 1, got 2"),
    ],
)
def test_options_of_classes_are_refused_at_once(build, message):
    with pytest.raises(ValueError, match=message):
        build()
