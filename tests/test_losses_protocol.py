"""The protocol of losses: configured by options, bound to two networks, weighed as terms."""

import copy
import inspect
import pickle
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference.features import WIDTH, agreeing_networks, batch, bound, features, source_in

import topkd.losses
from topkd.config import recipe
from topkd.config.validation import RecipeError
from topkd.features import Batch, Features
from topkd.losses import KD, LOSSES, RKD, Loss, LossTerm, TopKD, functional
from topkd.topology.approximation import Training
from topkd.training.check import check

PAPERS = (
    *("KD", "DKD", "NKD", "DIST", "TTM", "WTTM", "CTKD", "MLKD"),
    *("FitNet", "AT", "NST", "VID", "FSP", "AB", "OFD", "FT", "ReviewKD"),
    *("SP", "CC", "RKD", "PKT", "CRD"),
    *("SRRL", "SimKD", "CATKD"),
    *("TopKD", "RTDLite"),
)
INVALID = {
    "vid": ({"variance": -1.0}, "variance must be above 1e-05, got -1.0"),
    "crd": ({"momentum": 5.0}, r"momentum must be in \[0, 1\), got 5.0"),
    "pce": ({"bandwidth": -1.0, "tolerance": 1.0}, "bandwidth must be positive, got -1.0"),
    "ft": ({"rate": -1.0}, "rate must be positive, got -1.0"),
    "cat": ({"resolution": 0}, "resolution must be positive, got 0"),
    "ab": ({"margin": -1.0}, "margin must be positive, got -1.0"),
    "cc": ({"size": 0}, "size must be positive, got 0"),
    "at": ({"skip": -9}, "skip must not be negative, got -9"),
}


def recipe_with(name, **options):
    return recipe.parse(
        {
            "data": {"name": "digits"},
            "teacher": {"model": "resnet20", "checkpoint": "not read here"},
            "student": {"model": "resnet8"},
            "losses": [{"name": "ce"}, {"name": name, **options}],
        }
    )


# --- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INVALID)
def test_invalid_options_are_refused_before_there_are_features(name):
    options, message = INVALID[name]
    with pytest.raises(ValueError, match=f"^{message}$"):
        LOSSES[name](**options)


@pytest.mark.parametrize("name", INVALID)
def test_checking_a_recipe_refuses_invalid_options_and_says_where(name):
    options, message = INVALID[name]
    with pytest.raises(RecipeError, match=rf"^losses\[1\]: {message}$"):
        check(recipe_with(name, **options))


@pytest.mark.parametrize("given", ["bandwidth", "tolerance"])
def test_bandwidth_and_tolerance_are_given_together(given):
    message = "give bandwidth and tolerance, or neither"
    with pytest.raises(ValueError, match=message):
        LOSSES["pce"](**{given: -1.0})
    with pytest.raises(RecipeError, match=rf"^losses\[1\]: {message}"):
        check(recipe_with("pce", **{given: -1.0}))


@pytest.mark.parametrize("name", LOSSES)
def test_options_are_named_and_have_defaults(name):
    constructor = LOSSES[name].__init__
    if constructor is torch.nn.Module.__init__:  # no options
        with pytest.raises(TypeError):
            LOSSES[name](1)
        with pytest.raises(TypeError):
            LOSSES[name](nonsense=1)
        return
    _, *options = inspect.signature(constructor).parameters.values()
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY, option
        assert option.default is not inspect.Parameter.empty, option
        assert option.annotation is not inspect.Parameter.empty, option
    assert not LOSSES[name]().options


@pytest.mark.parametrize("name", LOSSES)
def test_configuring_creates_nothing_that_depends_on_features(name):
    before = torch.get_rng_state()
    loss = LOSSES[name]()
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(weight.numel() for weight in loss.parameters()) <= 1  # a temperature


@pytest.mark.parametrize("name", LOSSES)
def test_a_configured_loss_can_be_copied(name):
    options = {"temperature": 3.0} if name == "kd" else {}
    loss = LOSSES[name](**options)
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert copied.options == loss.options == options


def test_what_a_loss_was_given_cannot_be_changed():
    loss = KD(temperature=3.0)
    with pytest.raises(TypeError):
        loss.options["temperature"] = 4.0


# --- Options that change nothing ------------------------------------------------------------------

SHORT = Training(passes=2, epochs=2)
# Values that differ from the default, where none follows from the type of an option.
OTHER = {
    ("crd", "negatives"): 3,  # there are few images
    ("ctkd", "alpha"): 0.5,
    ("ctkd", "beta"): 0.5,
    ("mlkd", "temperatures"): (2.0, 2.0, 3.0, 5.0, 6.0),
    ("pce", "bandwidth"): 0.3,
    ("pce", "tolerance"): 0.3,
    ("review", "width"): 2,
    ("topkd", "form"): "landscape",
    ("topkd", "training"): replace(SHORT, epochs=3),
    ("topkd", "file"): "a.safetensors",
}
# Of grids with two loops each: in the range of vectorizations, or bars that differ enough.
SPACINGS = {"topkd": (0.25, 0.3), "wasserstein": (0.05, 1.0)}
TOGETHER = {"bandwidth": {"tolerance": 1.0}, "tolerance": {"bandwidth": 1.0}}
ALSO = {"ft": {"epochs": 2}}  # so that tests are short


def options_of(name):
    """Option -> default, and the other values to try; those with a choice of values come first."""
    constructor = LOSSES[name].__init__
    if constructor is torch.nn.Module.__init__:
        return {}, {}
    hints, choices, numbers = typing.get_type_hints(constructor), {}, {}
    for option, told in inspect.signature(constructor).parameters.items():
        if told.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        named = [hints[option], *typing.get_args(hints[option])]
        values = [v for h in named if typing.get_origin(h) is typing.Literal for v in h.__args__]
        values += [True, False] if hints[option] is bool else []
        default = told.default
        if values:
            choices[option] = default, [value for value in values if value != default]
        elif (name, option) in OTHER:
            numbers[option] = default, [OTHER[name, option]]
        else:
            other = default + 1 if isinstance(default, int) else 1.5 * default + 0.05
            numbers[option] = default, [other]
    return choices, numbers


def ineffective_cases():
    """Loss, mode (one option with a choice of values), another option, its default and value."""
    for name in LOSSES:
        choices, numbers = options_of(name)
        modes = [{}, *({o: v} for o, (_, values) in choices.items() for v in values)]
        for mode in modes:
            for option, (default, values) in (choices | numbers).items():
                for value in values if option not in mode else ():
                    label = f"{name} {mode or ''} {option} {value}"
                    yield pytest.param(name, mode, option, default, value, id=label)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_in(tmp_path_factory.mktemp("shared"))


def observed(name, options, source):
    """All that a loss computes in three epochs in which its own weights are trained."""
    options = ALSO.get(name, {}) | options
    if options.get("via", "exact") != "exact" and not options.get("file"):
        options = {"training": SHORT} | options
    width = 3 if LOSSES[name].info.any_width else WIDTH
    source, student, teacher = agreeing_networks(LOSSES[name], source, width)
    shown = batch()
    if name in SPACINGS:
        student, teacher = (
            replace(made, embedding=0.005 * made.embedding + grid(made.embedding.shape[1], space))
            for made, space in zip((student, teacher), SPACINGS[name], strict=True)
        )
    if options.get("views") == 2:
        shown = replace(shown, index=torch.arange(3).repeat(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = bound(LOSSES[name], student, teacher, source, **options).double().train()
        inputs = [t.requires_grad_() for t in student.tensors()]
        seen = []
        for epoch in (1, 2, 3):
            loss.on_epoch_start(epoch)
            other = teacher.apply(lambda t: t * torch.linspace(0.5, 2, t.shape[-1]))
            value = loss(student, other if epoch == 2 else teacher, shown)
            own = [weight for weight in loss.parameters() if weight.requires_grad]
            slopes = torch.autograd.grad(value, [*inputs, *own], allow_unused=True)
            seen += [value.detach(), *(s for s in slopes if s is not None)]
            with torch.no_grad():
                for weight, slope in zip(own, slopes[len(inputs) :], strict=True):
                    weight -= 0 if slope is None else 0.1 * slope
    return seen


def grid(width, spacing):
    """Six points in two rows at the distance 1."""
    corners = torch.cartesian_prod(spacing * torch.arange(3.0), torch.arange(2.0))
    return torch.nn.functional.pad(corners, (0, width - 2)).double()


def stands_for(name, mode):
    """The scale of lengths that a loss has by default."""
    if name != "topkd":
        return None
    return {"ripsnet": "none"}.get(mode.get("via"), "tree_mean")


def refuses(name, options, source):
    try:
        observed(name, options, source)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(("name", "mode", "option", "default", "value"), [*ineffective_cases()])
def test_an_option_that_changes_nothing_is_refused(name, mode, option, default, value, source):
    if option == "scale" and value == stands_for(name, mode):
        pytest.skip("the default by another name")
    together = TOGETHER.get(option, {})
    try:
        without = observed(name, mode | together | ({option: 1.0} if together else {}), source)
    except ValueError:
        assert mode  # what a loss does by default is not refused
        pytest.skip("a mode that is refused")
    try:
        changed = observed(name, mode | together | {option: value}, source)
    except (ValueError, FileNotFoundError) as error:
        is_number = option in options_of(name)[1] and default is not None
        if is_number and isinstance(error, ValueError):
            assert refuses(name, mode | {option: default}, source)  # whatever its value
        return
    alike = len(changed) == len(without) and all(map(torch.equal, changed, without))
    assert not alike


@pytest.mark.parametrize("form", ["products", "neighbors", "kernel"])
def test_a_recipe_with_an_option_that_changes_nothing_says_so(form):
    unused = {"kernel": "size"}.get(form, "order")
    message = rf"^losses\[1\]: {unused} has no effect with form: {form}; leave it out$"
    with pytest.raises(RecipeError, match=message):
        check(recipe_with("cc", form=form, **{unused: 2}))


# --- Laws of all losses --------------------------------------------------------------------------

# Losses that are not least for equal networks, and why.
NOT_LEAST = {
    "ce": "it compares with the labels",
    "deit": "it compares with the teacher's class",
    "nkd": "it is least for a student that is certain of the label",
    "ttm": "it softens the teacher only",
    "wttm": "it softens the teacher only",
    **dict.fromkeys(("ab", "ofd"), "it asks for a margin"),
    **dict.fromkeys(("cc", "crd", "fitnet", "ft", "review", "srrl", "vid"), "weights are between"),
    "cat": "the classifiers of both networks differ",
}
AS_NAMED = ("temperature", "temperatures", "lowest", "exponent")
CONSTANT = {
    "zero": torch.zeros_like,
    "one": torch.ones_like,
    "large": lambda t: torch.full_like(t, 1e4),
    "the same for all images": lambda t: t[:1].expand_as(t).clone(),
}


def in_single(features):
    return features.apply(lambda t: t.float())


def configured_in_single(name, source, width=WIDTH, **options):
    """A loss, bound to usual features; in eval mode, so that constants can be normalized."""
    also = {k: v for k, v in ALSO.get(name, {}).items() if k not in options}
    own, student, teacher = agreeing_networks(LOSSES[name], source, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = bound(LOSSES[name], student, teacher, own, **also, **options).float().eval()
    return loss, in_single(student), in_single(teacher)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(NOT_LEAST)))
def test_equal_networks_have_the_least_loss(name, source):
    loss, _, teacher = configured_in_single(name, source)
    least = loss(teacher, teacher, batch())
    assert not LOSSES[name].info.zero or least.abs() < 1e-6
    for seed in range(5):
        other = in_single(features(WIDTH, seed=10 + seed))
        moved = replace(
            other.apply(lambda t: 0.1 * t),
            logits=teacher.logits + 0.1 * other.logits,
            embedding=teacher.embedding + 0.1 * other.embedding,
            maps=[a + 0.1 * b for a, b in zip(teacher.maps, other.maps, strict=True)],
        )
        assert loss(moved, teacher, batch()) > least


def test_what_is_not_least_for_equal_networks_is_not_said_to_be_0():
    assert set(NOT_LEAST) < set(LOSSES)
    assert {n for n in LOSSES if not LOSSES[n].info.zero} == {*NOT_LEAST, "dist"}


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("constant", CONSTANT)
@pytest.mark.parametrize("name", LOSSES)
def test_constant_features_have_finite_gradients(name, constant, which, source):
    width = 3 if LOSSES[name].info.any_width else WIDTH
    loss, student, teacher = configured_in_single(name, source, width)
    if which != "teacher":
        student = student.apply(CONSTANT[constant])
    if which != "student":
        teacher = teacher.apply(CONSTANT[constant])
    inputs = [t.requires_grad_() for t in student.tensors()]
    own = [weight for weight in loss.parameters() if weight.requires_grad]
    value = loss(student, teacher, batch())
    assert value.isfinite()
    for slope in torch.autograd.grad(value, [*inputs, *own], allow_unused=True):
        assert slope is None or slope.isfinite().all()


def tempered():
    """Loss, option that is a temperature or its inverse, and other options."""
    for name in LOSSES:
        for option in options_of(name)[1]:
            if option in AS_NAMED:
                yield pytest.param(name, option, id=f"{name} {option}")


def extreme(name, option):
    """The smallest and the largest permitted value, as options."""
    highest = 1e6 if option == "exponent" else 100.0
    also = {"kind": "soft"} if name == "deit" else {"spread": 20.0} if option == "lowest" else {}
    if option == "temperatures":
        return [also | {option: (value,)} for value in (1e-6, highest)]
    return [also | {option: value} for value in (1e-6, highest - also.get("spread", 0.0))]


@pytest.mark.parametrize(("name", "option"), [*tempered()])
@pytest.mark.parametrize("end", [0, 1], ids=["lowest", "highest"])
@pytest.mark.parametrize("seed", range(3))
def test_extreme_temperatures_are_those_of_double_precision(name, option, end, seed, source):
    loss, _, _ = configured_in_single(name, source, **extreme(name, option)[end])
    generator = torch.Generator().manual_seed(seed)
    wide = [torch.randn(64, 100, generator=generator) for _ in range(2)]  # they differ by about 1
    student, teacher = (
        replace(in_single(features(WIDTH, seed=s, n=64)), logits=z, distilled=z)
        for s, z in enumerate(wide, 1)
    )
    shown = replace(batch(64), index=torch.arange(64) % 48)
    single = loss(student, teacher, shown)
    double = copy.deepcopy(loss).double()(
        *(f.apply(lambda t: t.double()) for f in (student, teacher)), shown
    )
    assert single.item() == pytest.approx(double.item(), rel=2e-3)


@pytest.mark.parametrize(("name", "option"), [*tempered()])
@pytest.mark.parametrize("end", [0, 1], ids=["lowest", "highest"])
def test_temperatures_out_of_range_are_refused(name, option, end):
    options = extreme(name, option)[end]
    given = options[option]
    factor = (0.99, 1.01)[end]
    beyond = tuple(factor * v for v in given) if isinstance(given, tuple) else factor * given
    with pytest.raises(ValueError, match=r"must be between 1e-06 and 1"):
        LOSSES[name](**options | {option: beyond})


def test_every_softened_loss_has_a_checked_temperature():
    found = {case.values[0] for case in tempered()}
    softened = {name for name in LOSSES if "emperature T" in (LOSSES[name].__doc__ or "")}
    assert softened <= found


# --- Terms ---------------------------------------------------------------------------------------


def test_a_factor_makes_a_term_of_a_loss():
    loss = KD(temperature=4.0)
    term = 2 * loss
    assert isinstance(term, LossTerm)
    assert term.loss is loss
    assert (term.settings.name, term.settings.weight) == ("kd", 2.0)
    assert term.settings.options == {"temperature": 4.0}
    assert term.title == "kd"


def test_a_loss_becomes_a_term_with_settings():
    term = TopKD().term(share=0.1, start=3)
    assert (term.settings.share, term.settings.start) == (0.1, 3)
    assert [term.is_active(epoch, 4) for epoch in (1, 2, 3, 4)] == [False, False, True, True]
    assert not term.settings.options


def test_a_term_of_a_loss_is_the_term_of_a_recipe():
    term = RKD(angle=0.0).term(weight=0.5, label="distances", warmup=2)
    same = recipe_with("rkd", angle=0.0, weight=0.5, label="distances", warmup=2).losses[1]
    assert term.settings == same
    assert term.title == "distances"


@pytest.mark.parametrize(
    "settings", [{"share": 2.0}, {"start": 0}, {"weight": -1.0}, {"start": 4, "stop": 3}]
)
def test_invalid_settings_of_a_term_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        KD().term(**settings)


@pytest.mark.parametrize("settings", [{"shaer": 0.1}, {"temperature": 3.0}])
def test_unknown_settings_of_a_term_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        KD(temperature=2.0).term(**settings)


class Means(Loss):
    """Somebody else's loss, which says nothing about itself."""

    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, student: Features, teacher: Features, batch: Batch) -> torch.Tensor:
        return (student.logits.mean() - teacher.logits.mean()).abs() ** self.power


def test_a_loss_without_info_is_a_term():
    term = 0.5 * Means(power=3.0)
    assert (term.title, term.settings.weight) == ("means", 0.5)
    assert term.settings.options == {"power": 3.0}
    student, teacher = features(3, seed=1), features(WIDTH, seed=2)
    term.setup(student, teacher, source_in(Path("nowhere")))
    term.on_epoch_start(1)
    expected = (student.logits.mean() - teacher.logits.mean()).abs() ** 3
    torch.testing.assert_close(term.value(student, teacher, batch()), expected)
    assert term.loss.metadata() == {}
    assert "means" not in LOSSES


def test_errors_of_setup_name_the_term():
    term = LOSSES["at"](skip=9).term(label="attention")
    made = features(3, seed=1)
    with pytest.raises(ValueError, match=r"^losses\.attention: skip leaves out the first 9 of 4 "):
        term.setup(made, made, source_in(Path("nowhere")))


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
def test_losses_are_called_as_in_their_papers(name):
    namespace = {}
    exec(f"from topkd.losses import {name}", namespace)
    loss = namespace[name]
    assert issubclass(loss, Loss)
    assert loss.__name__ == name
    assert LOSSES[loss.info.name] is loss
    assert name in topkd.losses.__all__


def test_every_loss_can_be_imported_by_the_name_of_its_class():
    classes = {loss.__name__ for loss in LOSSES.values()}
    assert len(classes) == len(LOSSES)
    assert classes <= set(topkd.losses.__all__) <= set(dir(topkd.losses))
    assert all(getattr(topkd.losses, name) is not None for name in topkd.losses.__all__)


def test_names_that_are_not_there_are_said():
    with pytest.raises(AttributeError, match="topkd.losses.*nonsense"):
        topkd.losses.nonsense  # noqa: B018


def test_functions_can_be_imported():
    assert len(set(functional.__all__)) == len(functional.__all__)
    assert all(inspect.isfunction(getattr(functional, name)) for name in functional.__all__)


# --- Binding -------------------------------------------------------------------------------------


def test_topological_distillation_is_the_loss(tmp_path):
    student, teacher = features(3, seed=1), features(WIDTH, seed=2)
    loss = bound(TopKD, student, teacher, source_in(tmp_path))
    expected = functional.topological_distillation(
        student.embedding, teacher.embedding, loss.describe
    )
    torch.testing.assert_close(loss(student, teacher, batch()), expected)


def test_topkd_asks_to_be_bound():
    with pytest.raises(ValueError, match=r"setup\(\) has to fit the vectorization before the"):
        TopKD()(features(3, seed=1), features(WIDTH, seed=2), batch())
