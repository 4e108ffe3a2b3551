"""What is declared holds: versions, links, workflows, and what the distributions contain."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def requirements():
    project = PROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*project["dependencies"], *extras)]


def oldest(requirement):
    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return Version(bound)


def steps(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_every_dependency_has_a_lower_bound():
    for requirement in requirements():
        assert any(part.operator == ">=" for part in requirement.specifier), requirement


def test_lower_bounds_are_the_versions_that_were_tested():
    page = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    tested = dict(re.findall(r"^\| ([\w.-]+) \| ([\w.+]+) \|$", page, flags=re.M))
    bounds = {canonicalize_name(r.name): oldest(r) for r in requirements()}
    for tool in ("mypy", "ruff", "types-pyyaml"):  # no test runs them
        del bounds[tool]
    assert {name: Version(version) for name, version in tested.items()} == bounds


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_that_exist(workflow):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    runs = " && ".join(step["run"] for step in steps(workflow) if "run" in step)
    called = re.findall(r"\bmake ([\w-]+)", runs)
    assert called
    assert set(called) <= targets


def test_supported_versions_of_python_are_those_that_are_checked():
    classified = re.findall(r":: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"for version in ([\d. ]+);", makefile)[1].split() == classified
    assert PROJECT["project"]["requires-python"] == f">={classified[0]}"
    (matrix,) = re.findall(
        r"python: (\[.+\])", "".join(w.read_text(encoding="utf-8") for w in WORKFLOWS)
    )
    assert {classified[0], classified[-1]} <= set(yaml.safe_load(matrix)) <= set(classified)


def test_links_of_the_readme_are_absolute_on_the_package_index():
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https?://)([^)]+)\)", text)
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert relative
    assert not re.search(r"\]\((?!https://)", text)
    for target in relative:
        assert re.search(rf"https://\S+/topkd/topkd/(blob/)?main/{re.escape(target)}\)", text)


def test_source_distribution_holds_what_the_tests_read():
    included = {
        path.strip("/") for path in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    }
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    read = set(re.findall(r'ROOT / f?"([\w.]+)', sources)) - {"pyproject.toml"}
    assert read <= included
