"""Recipes: strict, changed by key=value, and clear about what is wrong."""

import copy
import math

import pytest
import yaml

from topkd.config import recipe
from topkd.config.recipe import load, names, parse, write
from topkd.config.validation import RecipeError, parse_options, read_yaml
from topkd.losses import LOSSES
from topkd.training.check import teacher_recipe

SMALL = {
    "name": "small",
    "data": {"name": "digits"},
    "teacher": {"model": "resnet20", "recipe": "digits/teacher"},
    "student": {"model": "resnet8"},
    "losses": [{"name": "ce"}, {"name": "kd", "weight": 2.0, "temperature": 4.0}],
    "controls": {"ce": [{"name": "ce"}]},
    "epochs": 3,
}


def changed(**changes):
    return copy.deepcopy(SMALL) | changes


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in SMALL.items() if key != "name"}),
        encoding="utf-8",
    )
    return str(path)


# --- There and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_reading_what_was_written_gives_the_same(name, tmp_path):
    first = load(name)
    path = tmp_path / "again.yaml"
    path.write_text(write(first), encoding="utf-8")
    again = load(str(path))
    assert again == first
    assert again.hash == first.hash
    assert write(again) == write(first)
    assert parse(yaml.safe_load(write(first))) == first  # with any reader of YAML


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.lr=1e-5",
        "optimizer.weight_decay=1e-30",
        "data.root='a: b # c'",
        "name='1e3'",
        "name='1.5'",
        "name='0'",
        "data.root='1:30'",
        "data.root='2024-01-01'",
        "name=ä",
    ],
)
def test_awkward_values_are_written_so_that_they_can_be_read(change):
    first = load("digits", [change])
    assert parse(yaml.safe_load(write(first))) == first
    assert parse(read_yaml(write(first), "here")) == first


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_are_called_by_their_name(name):
    assert load(name).name == name
    assert recipe.text(name).strip()
    assert yaml.safe_load(recipe.text(name))["losses"]


def test_shipped_recipes_are_all_found():
    assert {"digits", "digits/teacher", "cifar100/teachers/resnet20"} <= set(names())
    assert names() == sorted(names())


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_say_in_their_first_line_what_they_are(name):
    assert len(recipe.about(name)) > 10


def test_every_loss_has_a_recipe():
    variants = [terms for name in names() for terms in load(name).variants.values()]
    assert {term.name for terms in variants for term in terms} == set(LOSSES)


def test_a_file_is_called_by_its_name_unless_it_says_another(file, tmp_path):
    assert load(file).name == "some"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    assert load(str(tmp_path / "other.yaml")).name == "small"


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load("digits").epochs = 3


def test_hash_knows_everything_but_the_name():
    first = parse(SMALL)
    assert parse(changed(name="another")).hash == first.hash
    for change in ({"epochs": 4}, {"losses": [{"name": "kd"}]}, {"controls": {}}):
        assert parse(changed(**change)).hash != first.hash
    hot = changed()
    hot["losses"][1]["temperature"] = 5.0
    assert parse(hot).hash != first.hash


def test_hash_does_not_depend_on_the_order_of_keys():
    assert parse(dict(reversed(SMALL.items()))).hash == parse(SMALL).hash


def test_options_are_what_is_no_field():
    kd = parse(SMALL).losses[1]
    assert (kd.weight, kd.warmup, kd.options) == (2.0, 0, {"temperature": 4.0})


def test_variants_are_the_controls_and_the_losses():
    assert list(parse(SMALL).variants) == ["ce", "kd"]


# --- Messages ------------------------------------------------------------------------------------

WRONG = {
    "unknown key": (changed(epohcs=3), "epohcs: unknown key; did you mean 'epochs'?"),
    "unknown key, far from all": (
        changed(zzz=3),
        "zzz: unknown key; there are name, data, teacher",
    ),
    "unknown key, inside": (
        changed(optimizer={"lr": 0.1, "momemtum": 0.9}),
        "optimizer.momemtum: unknown key; did you mean 'momentum'?",
    ),
    "unknown key, of the teacher": (
        changed(teacher={"model": "a", "recpie": "b", "checkpoint": "c"}),
        "teacher.recpie: unknown key; did you mean 'recipe'?",
    ),
    "missing": ({k: v for k, v in SMALL.items() if k != "student"}, "student: missing"),
    "missing, inside": (changed(student={}), "student.model: missing"),
    "missing, in a list": (changed(losses=[{"name": "ce"}, {}]), "losses[1].name: missing"),
    "missing, in a control": (changed(controls={"a": [{}]}), "controls.a[0].name: missing"),
    "text for a number": (changed(epochs="3"), "epochs: expected integer, got '3'"),
    "number for a text": (changed(data={"name": 3}), "data.name: expected string, got 3"),
    "fraction for a whole": (changed(epochs=2.5), "epochs: expected integer, got 2.5"),
    "truth for a number": (changed(epochs=True), "epochs: expected integer, got True"),
    "text for a number, in a list": (
        changed(losses=[{"name": "ce", "weight": "2"}]),
        "losses[0].weight: expected number, got '2'",
    ),
    "text for a section": (changed(data="digits"), "data: expected an object, got 'digits'"),
    "nothing for a section": (changed(student=None), "student: expected an object, got None"),
    "text for a list": (changed(losses="ce"), "losses: expected array, got 'ce'"),
    "out of a choice": (
        changed(optimizer={"schedule": "linear"}),
        "optimizer.schedule: expected 'milestones', 'cosine' or 'one-cycle', got 'linear'",
    ),
    "below the bound": (changed(epochs=0), "epochs: expected greater than 0, got 0"),
    "a batch of one": (changed(batch_size=1), "batch_size: expected greater than 1, got 1"),
    "negative weight": (
        changed(losses=[{"name": "ce", "weight": -1.0}]),
        "losses[0].weight: expected greater than or equal to 0, got -1.0",
    ),
    "a share above one": (
        changed(data={"name": "digits", "validation": 1.5}),
        "data.validation: expected less than 1, got 1.5",
    ),
    "no loss": (changed(losses=[]), "losses: expected"),
    "a teacher without weights": (
        changed(teacher={"model": "resnet20"}),
        "teacher: needs a checkpoint (a file) or a recipe that trains it",
    ),
    "half of a normalization": (
        changed(teacher={"model": "a", "checkpoint": "b", "mean": [0.5, 0.5, 0.5]}),
        "teacher: mean and std must be set together",
    ),
    "a mean of two channels": (
        changed(teacher={"model": "a", "checkpoint": "b", "mean": [0.5, 0.5], "std": [1, 1, 1]}),
        "teacher.mean",
    ),
    "a control called like the losses": (
        changed(controls={"kd": [{"name": "ce"}]}),
        "controls: 'kd' is the name of the runs with `losses`",
    ),
    "a control that leaves its folder": (
        changed(controls={"../x": [{"name": "ce"}]}),
        "'../x' cannot name a run",
    ),
}


@pytest.mark.parametrize(("tree", "message"), WRONG.values(), ids=WRONG)
def test_says_where_what_was_got_and_what_would_be_right(tree, message):
    with pytest.raises(RecipeError) as caught:
        parse(tree)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)  # one thing is wrong, one line says so


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        parse(changed(epochs="3", epohcs=3, student={}))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["optimizer", "losses"])
def test_numbers_that_are_none_are_refused(number, where):
    wrong = {"lr": number} if where == "optimizer" else [{"name": "ce", "weight": number}]
    with pytest.raises(RecipeError, match=where):
        parse(changed(**{where: wrong}))


def test_a_recipe_that_does_not_exist():
    with pytest.raises(RecipeError, match="there is no recipe 'digist'; did you mean 'digits'?"):
        load("digist")
    with pytest.raises(RecipeError, match="there is no recipe 'zzz'; `topkd list recipes` lists"):
        load("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("a: 1\n b: 2", "is not YAML"),
        ("- 1", "a recipe is a mapping of keys to values"),
        ("", "a recipe is a mapping of keys to values"),
        ("word", "a recipe is a mapping of keys to values"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


# --- Changes -------------------------------------------------------------------------------------


CHANGES = {
    "epochs=7": (("epochs",), 7),
    "name=other": (("name",), "other"),
    "optimizer.lr=0.5": (("optimizer", "lr"), 0.5),
    "optimizer.nesterov=true": (("optimizer", "nesterov"), True),
    "optimizer.milestones=[1, 2]": (("optimizer", "milestones"), (1, 2)),
    "data={name: folder, root: a=b}": (("data", "options"), {"root": "a=b"}),
    "data.root=a=b": (("data", "options"), {"root": "a=b"}),
    "teacher=": (("teacher",), None),
    "gradient_clip=null": (("gradient_clip",), None),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.items())
def test_a_change_is_made(file, change, expected):
    path, value = expected
    found = load(file, [change])
    for step in path:
        found = getattr(found, step)
    assert found == value


@pytest.mark.parametrize("place", ["losses.kd.weight", "losses.1.weight", "losses[1].weight"])
def test_an_item_of_a_list_is_found_by_name_or_number(file, place):
    assert load(file, [f"{place}=7"]).losses[1].weight == 7


def test_options_and_controls_are_changed(file):
    found = load(file, ["losses.kd.temperature=2.5", "controls.ce.ce.weight=3"])
    assert found.losses[1].options == {"temperature": 2.5}
    assert found.controls["ce"][0].weight == 3


def test_the_last_of_several_changes_holds(file):
    assert load(file, ["epochs=7", "epochs=8"]).epochs == 8


def test_a_change_leaves_the_rest_as_it_was(file):
    before, after = load(file), load(file, ["optimizer.lr=0.5"])
    assert after == before.model_copy(
        update={"optimizer": before.optimizer.model_copy(update={"lr": 0.5})}
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 1e-2),
        ("1E-2", 1e-2),
        ("5.0e-4", 5e-4),
        ("5.e-4", 5e-4),
        (".5e-3", 5e-4),
        ("1e+1", 10.0),
        ("1e1", 10.0),
        ("1", 1.0),
        ("0.1", 0.1),
    ],
)
def test_numbers_may_be_written_scientifically(file, tmp_path, text, value):
    assert load(file, [f"optimizer.lr={text}"]).optimizer.lr == value
    path = tmp_path / "scientific.yaml"
    path.write_text(yaml.safe_dump(SMALL) + f"optimizer: {{lr: {text}}}\n", encoding="utf-8")
    assert load(str(path)).optimizer.lr == value


def test_other_readers_of_yaml_are_left_alone():
    assert yaml.safe_load("1e-2") == "1e-2"  # as YAML 1.1 has it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs", "a change is written key=value, got 'epochs'"),
        ("=3", "a change is written key=value, got '=3'"),
        (".=3", "a change is written key=value"),
        ("[]=3", "a change is written key=value"),
        ("epohcs=3", "epohcs: unknown key; did you mean 'epochs'?"),
        ("optimizer.rate=3", "optimizer.rate: unknown key"),
        ("epochs=three", "epochs: expected integer, got 'three'"),
        ("epochs.more=3", "epochs has no keys, it is 3"),
        ("epochs.more.still=3", "epochs has no keys, it is 3"),
        ("losses.kdd.weight=3", "there is no 'kdd'; there are ce, kd"),
        ("losses[2].weight=3", "there is no '2'; there are ce, kd"),
        ("losses.-1.weight=3", "there is no '-1'; there are ce, kd"),
        ("epochs={", "the value is not YAML"),
        ("losses.kd=3", "losses[1]: expected an object, got 3"),
    ],
)
def test_a_change_that_cannot_be_made_is_told(file, change, message):
    with pytest.raises(RecipeError) as caught:
        load(file, [change])
    assert message in str(caught.value)


# --- Options -------------------------------------------------------------------------------------


def function(sample, *, must: int, rate: float = 1.0, name: str | None = None):
    return sample, must, rate, name


def test_options_are_checked_against_the_function():
    assert parse_options(function, {"must": 1}, "losses[0]") == {"must": 1}
    found = parse_options(function, {"must": 1, "rate": 2, "name": "a"}, "losses[0]")
    assert found == {"must": 1, "rate": 2.0, "name": "a"}
    assert function(0, **found) == (0, 1, 2.0, "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "losses[0].must: missing"),
        ({"must": "1"}, "losses[0].must: expected integer, got '1'"),
        ({"must": 1, "rat": 2.0}, "losses[0].rat: unknown key; did you mean 'rate'?"),
        ({"must": 1, "sample": 2.0}, "losses[0].sample: unknown key"),
        ({"must": 1, "name": 3}, "losses[0].name: expected string, got 3"),
    ],
)
def test_wrong_options_are_told_with_their_place(options, message):
    with pytest.raises(RecipeError) as caught:
        parse_options(function, options, "losses[0]")
    assert message in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text(
        "epochs: 1\ndata: {name: digits}\nepochs: 2\n", encoding="utf-8"
    )
    with pytest.raises(RecipeError, match="the key 'epochs' appears twice"):
        recipe.load(str(tmp_path / "twice.yaml"))


PLAIN = {"data": {"name": "digits"}, "student": {"model": "resnet8"}, "losses": [{"name": "ce"}]}
BOMB = "a0: &a0 [1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "it has more than 100,000 parts"),
        ("[" * 3000, "is nested too deep"),
        ("{a: " * 3000, "is nested too deep"),
        ("a: " + "[" * 200 + "]" * 200, "is nested too deep"),
        ("a: &a [*a]", "the node in line 1 contains itself"),
        ("a: &a {b: *a}", "the node in line 1 contains itself"),
        ("? [1, 2]\n: 3", "the key [1, 2] in line 1 is not text; quote it"),
        ("7: 3", "the key 7 in line 1 is not text; quote it"),
        ("on: 3", "the key True in line 1 is not text; quote it"),
        ("epochs: !!int abc", "invalid literal for int"),
        ("epochs: 1\nepochs: 2", "the key 'epochs' appears twice, again in line 2"),
        ("a: [", "expected the node content, but found '<stream end>' in line 1, column 5"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: \x07", "special characters are not allowed"),
        ("--- 1\n--- 2", "but found another document in line 2, column 1"),
        ("- 1", "a recipe is a mapping of keys to values"),
        ("", "a recipe is a mapping of keys to values"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        recipe.load(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), (".5", 0.5), ("1.", 1.0), ("-3", -3), ("1_000", 1000), ("-.inf", -math.inf),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("010", "010"), ("0x1F", "0x1F"),
        ("1:30.5", "1:30.5"), ("true", True), ("~", None),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text, value):
    found = read_yaml(f"a: {text}", "here")["a"]
    assert found == value
    assert type(found) is type(value)


def test_mappings_can_be_merged():
    text = "a: &a {lr: 1, momentum: 2}\nb: {<<: *a, lr: 3}"
    assert read_yaml(text, "here")["b"] == {"lr": 3, "momentum": 2}


@pytest.mark.parametrize(
    "name", ["..", "/elsewhere/x", "../../x", "a/../b", "a//b", "a/", "a\0b", ".a", "a\\b", "~"]
)
def test_a_name_stays_below_out(name):
    with pytest.raises(RecipeError, match="cannot name a folder below --out"):
        recipe.parse(PLAIN | {"name": name})


@pytest.mark.parametrize("name", ["mine", "cifar100/resnet20-resnet8", "my run.2", "étude+1"])
def test_names_of_folders_are_taken(name):
    assert recipe.parse(PLAIN | {"name": name}).name == name


@pytest.mark.parametrize("epochs", [2, 3, 20, 240])
@pytest.mark.parametrize("name", names())
def test_shipped_recipes_can_be_shortened(name, epochs):
    short = load(name, [f"epochs={epochs}"])
    for terms in short.variants.values():
        for term in terms:
            assert any(term.schedule(epoch, epochs) for epoch in range(1, epochs + 1)), term.title


# RepDistiller trains the first stage of AB and FSP for 30 of 240 epochs.
@pytest.mark.parametrize("method", ["ab", "fsp"])
def test_stages_of_shipped_recipes_are_those_of_the_authors(method):
    first, labels = load(f"methods/resnet56-resnet20/{method}").losses
    assert (first.span(240), labels.span(240)) == ((1, 30), (31, 240))


# Sun et al.: `tools/train.py` multiplies DKD's weights, and replaces MLKD's base temperature and
# weight; the files of the logs give temperature, weight and beta.
def test_recipes_of_standardized_logits_are_those_of_the_authors():
    def options(method):
        term = load(f"methods/resnet56-resnet20/{method}-standardized").losses[1]
        return term.weight, term.options

    assert options("kd") == (9, {"temperature": 2, "standardize": True})
    assert options("dkd") == (
        1,
        {"alpha": 18 * 1.0, "beta": 18 * 2.0, "temperature": 3, "standardize": True},
    )
    assert options("mlkd") == (
        9,
        {"views": 2, "standardize": True, "temperatures": sorted([2, 3, 5, 2, 6])},
    )
    assert options("ctkd") == (9, {"standardize": True})


def test_a_fraction_has_the_hash_of_its_epoch():
    def of(stop, start, epochs=240):
        losses = [{"name": "fsp", "stop": stop}, {"name": "ce", "start": start}]
        return parse(changed(losses=losses, controls={"a": losses}, epochs=epochs)).hash

    assert of(0.125, 0.125) == of(30, 31)
    assert of(0.125, 0.125) != of(29, 30)
    assert of(0.125, 0.125, epochs=20) == of(3, 4, epochs=20)


def test_whole_epochs_are_written_as_before():
    tree = changed(losses=[{"name": "ce", "start": 1, "stop": 3}], controls={})
    term = parse(tree).losses[0]
    written = term.model_dump_json(include={"start", "stop"})
    assert written == '{"start":1,"stop":3}'


def test_many_epochs_are_checked_at_once():
    terms = [{"name": "ce", "stop": 5_000_000}, {"name": "kd", "start": 5_000_001}]
    assert recipe.parse(PLAIN | {"losses": terms, "epochs": 9_999_999}).epochs == 9_999_999
    terms[1]["start"] += 1
    with pytest.raises(RecipeError, match="no term with a weight is active in epoch 5000001"):
        recipe.parse(PLAIN | {"losses": terms, "epochs": 9_999_999})


def test_a_teachers_recipe_is_found_beside_the_recipe(tmp_path):
    teacher = PLAIN | {"student": {"model": "resnet8"}, "epochs": 3}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(teacher), encoding="utf-8")
    own = PLAIN | {"teacher": {"model": "resnet8", "recipe": "t.yaml"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    assert teacher_recipe(recipe.load(str(tmp_path / "mine.yaml"))).epochs == 3
    (tmp_path / "t.yaml").unlink()
    with pytest.raises(RecipeError, match=r"^there is no file t\.yaml$"):
        teacher_recipe(recipe.load(str(tmp_path / "mine.yaml")))


def test_the_folder_of_a_teachers_recipe_is_not_part_of_the_hash(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(PLAIN), encoding="utf-8")
    own = PLAIN | {"teacher": {"model": "resnet8", "recipe": "t.yaml"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    beside = recipe.load("mine.yaml")
    monkeypatch.chdir(tmp_path / "inner")
    for path in ("../mine.yaml", str(tmp_path / "mine.yaml")):
        loaded = recipe.load(path)
        assert loaded.teacher.recipe != beside.teacher.recipe
        assert loaded.hash == beside.hash
        assert recipe.difference(loaded, beside) == "no difference"
    named = PLAIN | {"teacher": {"model": "resnet8", "recipe": "digits/teacher"}}
    other = PLAIN | {"teacher": {"model": "resnet8", "recipe": "own/teacher"}}
    assert recipe.parse(named).hash != recipe.parse(other).hash


def test_a_difference_is_told_at_its_leaf():
    there = recipe.parse(PLAIN | {"optimizer": {"lr": 0.05}})
    here = recipe.parse(PLAIN | {"optimizer": {"lr": 0.02}})
    assert recipe.difference(there, here) == "optimizer.lr: 0.05 there, 0.02 here"
    other = recipe.parse(PLAIN | {"teacher": {"model": "resnet8", "checkpoint": "a.pth"}})
    assert recipe.difference(here, other).startswith("teacher: null there, {")
