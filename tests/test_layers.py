"""The house keeps its order: which part may import which, read off the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import topkd

ROOT = Path(topkd.__file__).parent
LEVELS = {  # an import points to a lower number
    "cli": 8,
    "export": 7,
    "studies": 7,
    "training": 6,
    "reporting": 6,
    "losses": 5,
    "evaluation": 5,
    "models": 4,
    "data": 4,
    "features": 3,
    "_runtime": 2,
    "config": 1,
    "topology": 1,
    "_io": 1,
}
FREE = {"topkd", "topkd.__main__"}  # the front door, and the command line
# Licenses that ours does not go with, and libraries that are only here to be compared with.
FORBIDDEN = {
    "gudhi",
    "ripser",
    "persim",
    "gtda",
    "gph",
    "torch_topological",
    "multipers",
    "pingouin",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(name: str, source: str, is_package: bool) -> set[str]:
    """Every module that is imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".") if is_package else name.split(".")[:-1]
            base = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from topkd import data` imports a module, `from topkd.data import DATA` a name.
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in MODULES else module)
    return found


IMPORTS = {
    name: imports_of(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    for name, path in MODULES.items()
}
OWN = {name: {i for i in imports if i in MODULES} - {"topkd"} for name, imports in IMPORTS.items()}


def part(name: str) -> str:
    return name.split(".")[1]


def test_imports_are_read_as_python_reads_them():
    source = (
        "import os.path\nfrom topkd import features, __version__\nfrom topkd.data import DATA\n"
    )
    found = imports_of("topkd.x", source, False)
    assert found == {"os.path", "topkd.features", "topkd", "topkd.data"}
    inside = (
        "def f():\n    from .base import Loss\n    from . import files\n    from .. import data\n"
    )
    found = imports_of("topkd.losses.logits", inside, False)
    assert found == {"topkd.losses.base", "topkd.losses", "topkd.data"}
    assert imports_of("topkd.losses", "from .base import Loss", True) == {"topkd.losses.base"}
    assert OWN["topkd.losses.base"] >= {"topkd.features"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - FREE))
def test_every_part_has_its_level(name):
    assert part(name) in LEVELS, "a new part of the house: give it a level in LEVELS"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - FREE))
def test_imports_never_point_upwards(name):
    others = {i for i in OWN[name] if part(i) != part(name)}
    assert not {i for i in others if LEVELS[part(i)] >= LEVELS[part(name)]}


def test_contributing_describes_the_house_as_it_is():
    page = (ROOT.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", page, flags=re.M)
    assert {part: int(level) for level, part in rows} == LEVELS
    assert {part(name) for name in MODULES.keys() - FREE} == LEVELS.keys()


def circles(graph):
    """What is left of a graph after everything that imports nothing left has been taken away."""
    left = {name: set(imports) for name, imports in graph.items()}
    while free := {name for name, imports in left.items() if not imports & left.keys()}:
        left = {name: imports for name, imports in left.items() if name not in free}
    return left


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": set()}) == {}
    assert circles({"a": {"b"}, "b": {"a"}, "c": set()}).keys() == {"a", "b"}


def test_there_is_no_circle_of_modules():
    assert circles(OWN) == {}


def test_there_is_no_circle_of_parts():
    parts = {}
    for name in MODULES.keys() - FREE:
        others = {part(i) for i in OWN[name]} - {part(name)}
        parts.setdefault(part(name), set()).update(others)
    assert circles(parts) == {}


def test_topology_could_be_a_package_of_its_own():
    inside = {name for name in MODULES if name.startswith("topkd.topology")}
    for name in inside:
        assert {i for i in IMPORTS[name] if i.split(".")[0] == "topkd"} <= inside


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_of_another_license_is_imported(name):
    assert not {i.split(".")[0] for i in IMPORTS[name]} & FORBIDDEN


def loaded_by(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True
    )
    return set(done.stdout.split())


def test_import_of_the_package_is_light():
    loaded = loaded_by("import topkd; topkd.__version__")
    assert "topkd" in loaded
    assert not loaded & {"torch", "matplotlib", "numba", "numpy", "pydantic", "rich"}


def test_training_and_reports_load_no_package_before_its_use():
    loaded = loaded_by(
        "import topkd.topology, topkd.losses, topkd.models, topkd.data, topkd.models.checkpoint\n"
        "import topkd.reporting.page"
    )
    assert not loaded & {
        "matplotlib",
        "umap",
        "jinja2",
        "typer",
        "sklearn",
        "pyarrow",
        "torchvision",
    }
