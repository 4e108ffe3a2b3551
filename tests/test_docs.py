"""The documentation: what is generated is fresh, what it shows is right, what it names is there."""

import csv
import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from topkd._io import files
from topkd.cli.app import app
from topkd.config import recipe, sections, study, terms
from topkd.config.validation import RecipeError
from topkd.data import DATA
from topkd.losses import LOSSES
from topkd.models import MODELS
from topkd.studies.plan import Place
from topkd.training.check import check

ROOT = Path(__file__).parent.parent
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
}
PUBLISHED = "sources.csv", "accuracies.csv"
OWN = """
from torch import nn


def small(classes, size=32):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *pooled, nn.Linear(16, classes))
"""
REST = {
    "data": "data: {name: cifar100}",
    "teacher": "teacher: {model: resnet56, recipe: cifar100/teachers/resnet56}",
    "student": "student: {model: resnet20}",
    "losses": "losses: [{name: ce}]",
}

if "losses.md" not in PAGES:
    pytest.skip("the documentation is not here", allow_module_level=True)


def script():
    spec = importlib.util.spec_from_file_location("docs_losses", ROOT / "docs/losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries():
    """Each loss with its part of the page."""
    parts = re.split(r"^### (\w+)\n", PAGES["losses.md"], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# --- The study on digits -------------------------------------------------------------------------


NUMBER = r"(\d+(?:\.\d+)?)"


@pytest.mark.parametrize(("form", "ending"), [("latex", "tex"), ("csv", "csv"), ("markdown", "md")])
def test_tables_of_the_study_are_made_from_its_results(form, ending, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the documentation says to type it
    words = ["study", "table", "studies/digits.yaml", "--results", "results/digits-study"]
    made = CliRunner().invoke(app, [*words, "--format", form])
    assert made.exit_code == 0, made.output
    written = (ROOT / f"docs/digits-study/table.{ending}").read_text(encoding="utf-8")
    made, written = (re.split(NUMBER, text) for text in (made.stdout, written))
    assert made[::2] == written[::2]
    # Versions of SciPy differ in the last bits, which only the CSV shows.
    numbers = [float(number) for number in written[1::2]]
    assert [float(number) for number in made[1::2]] == pytest.approx(numbers, rel=1e-12)


# --- The page of losses --------------------------------------------------------------------------


def test_page_of_losses_is_fresh():
    fresh = script().page() == PAGES["losses.md"]
    assert fresh, "run `python docs/losses.py > docs/losses.md`"


@pytest.mark.parametrize("name", ["speed", "methods", "published"])
def test_pages_of_results_are_fresh(name, capsys):
    runpy.run_path(str(ROOT / f"docs/{name}.py"))
    fresh = capsys.readouterr().out == PAGES[f"{name}.md"]
    assert fresh, f"run `python docs/{name}.py > docs/{name}.md`"


def test_page_of_published_results_has_our_runs_when_there_are_any(tmp_path):
    page = runpy.run_path(str(ROOT / "docs/published.py"))["page"]
    assert page(tmp_path).count("not run yet") == 6
    pair, place = "resnet56-resnet20", Place(tmp_path)
    accuracies = {("kd", 0): 71.0, ("kd", 1): 72.0, ("ce", 0): 69.0}
    for job in study.load(ROOT / "studies/topology/paper.yaml").jobs():
        if job.setting == pair and (job.variant, job.seed) in accuracies:
            reached = {"top1": accuracies[job.variant, job.seed]}
            result = {"recipe_hash": job.recipe.hash, "last": reached, "teacher": {"top1": 73.5}}
            files.write_sealed(place.run(job) / "result.json", result)
    text = page(tmp_path)
    assert "KD alone | 71.50 ± 0.71 | 73.50 | 69.00 | 1 : 2 | – | 4 | 240 | 2 | last |" in text
    assert text.count("not run yet") == 5


def test_sources_of_published_results_are_listed_and_used():
    listed, used = (
        {row["source"] for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())}
        for path in (ROOT / "results/published" / name for name in PUBLISHED)
    )
    assert listed == used


def test_every_loss_has_one_entry():
    headings = re.findall(r"^### (\w+)$", PAGES["losses.md"], flags=re.M)
    assert sorted(headings) == sorted([*LOSSES, "Controls"])


@pytest.mark.parametrize("name", LOSSES)
def test_entry_has_formula_paper_and_cost(name):
    text = entries()[name]
    assert LOSSES[name].info.url in text
    assert LOSSES[name].info.cost in text
    assert "$$" in text or name in ("ce", "mse", "wttm")  # whose formula is another entry's
    assert not re.search(r":\w+:`|\.\. math|``", text.replace("```", ""))


@pytest.mark.parametrize("name", LOSSES)
def test_recipes_take_the_options_of_an_entry_and_no_other(name):
    rows = re.findall(r"^\| `([\w.]+)` \| .+? \| (?:`(.*?)` )?\|", entries()[name], flags=re.M)
    classifier = "teacher" if name == "simkd" else "own"
    changes = [
        f"losses=[{{name: ce, label: labels}}, {{name: {name}}}]",
        f"student.classifier={classifier}",
    ]
    for option, default in rows:
        given = recipe.load(
            "digits", [*changes, *([f"losses.1.{option}={default}"] * bool(default))]
        )
        try:
            check(given)
        except RecipeError as refused:  # options of another form
            if f"{option.partition('.')[0]} has no effect with" not in str(refused):
                raise
    with pytest.raises(RecipeError) as error:
        check(recipe.load("digits", [*changes, "losses.1.nonsense=1"]))
    told = str(error.value).partition("; there are ")[2]
    known = {option.partition(".")[0] for option, _ in rows}
    assert set(filter(None, told.split(", "))) == known


# --- What the pages show -------------------------------------------------------------------------


def snippets():
    for name, text in PAGES.items():
        found = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.M | re.S)
        yield from (pytest.param(part, id=f"{name}-{i}") for i, part in enumerate(found))


@pytest.mark.parametrize("snippet", list(snippets()))
def test_snippets_are_parts_of_recipes_that_are_right(snippet, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    if "timm:" in snippet:
        pytest.importorskip("timm")
    if "variants:" in snippet:  # a study, each of whose recipes is checked
        (tmp_path / "study.yaml").write_text(snippet, encoding="utf-8")
        plan = study.load(tmp_path / "study.yaml")
        for each in plan.recipes.values():
            check(each)
        return
    rest = [line for key, line in REST.items() if not re.search(rf"^{key}:", snippet, flags=re.M)]
    (tmp_path / "whole.yaml").write_text("\n".join([snippet, *rest]), encoding="utf-8")
    where = ["data.root=FOLDER"] if "{name: folder," in snippet else []
    check(recipe.load(str(tmp_path / "whole.yaml"), where))


def test_numbers_of_parameters_are_those_of_the_networks():
    rows = re.findall(r"^\| `(\S+)` \| ([\d,]+) \| (\d+) \|", PAGES["models.md"], flags=re.M)
    counted = {}
    with torch.device("meta"):
        for name in MODELS:
            network = MODELS[name].build(100)
            counted[name] = sum(weight.numel() for weight in network.parameters())
    assert {name: int(count.replace(",", "")) for name, count, _ in rows} == counted


@pytest.mark.parametrize(
    "section",
    [
        recipe.Recipe,
        sections.DataSection,
        sections.RandAugment,
        sections.TeacherSection,
        sections.StudentSection,
        terms.Term,
        terms.View,
        sections.Optimizer,
    ],
)
def test_every_key_of_a_recipe_is_told(section: type[BaseModel]):
    pages = PAGES["recipes.md"] + PAGES["data.md"]
    assert [key for key in section.model_fields if not re.search(rf"`[^`]*\b{key}\b", pages)] == []


@pytest.mark.parametrize("name", DATA)
def test_every_source_of_data_is_told(name):
    assert f"`{name}`" in PAGES["data.md"]
    assert f"`{name}`" in PAGES["recipes.md"]


# --- What the pages name -------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    here = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        assert not path or (here / path).exists(), target
        if anchor:
            text = PAGES[Path(path).name if path else page]
            titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
            there = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in there, target


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_recipes_are_there(page):
    commands = get_command(app).commands
    for command, argument in re.findall(r"(?:^|`)topkd ([a-z]+)(?: ([\w/-]+))?", PAGES[page], re.M):
        assert command in commands, command
        if command in ("run", "show", "copy", "doctor", "check", "teacher") and "/" in argument:
            assert argument in recipe.names(), argument
