"""Text is UTF-8 whatever the locale, and what a terminal cannot show stops no command."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from topkd.config import recipe

ROOT = Path(__file__).parents[1]
# Python's own ways to UTF-8 are closed, so that the locale counts: one that knows ASCII alone.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
WRITTEN = "# Größe, 持続, ½\nname: größe-持続\nepochs: 1\ndata: {name: digits}\n"
WRITTEN += "student: {model: resnet8}\nlosses: [{name: ce}]\n"


def printed(*words, encoding="utf-8", **environment):
    done = subprocess.run(
        [sys.executable, "-m", "topkd", *map(str, words)],
        capture_output=True,
        env={**os.environ, **ASCII, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(encoding)
    return done.stdout.decode(encoding)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "written.yaml"
    path.write_bytes(WRITTEN.encode())
    return path


def test_shipped_recipe_is_read_under_an_ascii_locale():
    name = "methods/resnet20-resnet8/ultrametric"
    assert not recipe.text(name).isascii()
    assert printed("show", name).startswith(f"name: {name}")


def test_recipe_is_copied_unchanged_under_an_ascii_locale(written, tmp_path):
    printed("copy", written, tmp_path / "copy.yaml")
    assert (tmp_path / "copy.yaml").read_bytes() == WRITTEN.encode()


def test_western_console_shows_what_it_can(written):
    shown = printed("show", written, encoding="cp1252", PYTHONIOENCODING="cp1252")
    assert "name: größe-\\u6301\\u7d9a" in shown


def test_recipe_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: größe\n".encode("latin-1"))
    with pytest.raises(recipe.RecipeError, match=r"latin\.yaml is not UTF-8"):
        recipe.text(str(path))


def calls_without_encoding(source):
    """Lines that read or write text as the locale has it, which a linter cannot always tell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            named = {keyword.arg for keyword in node.keywords}
            method = getattr(node.func, "attr", "")
            if "encoding" not in named and (
                method in ("read_text", "write_text") or named & {"text", "universal_newlines"}
            ):
                yield node.lineno


def test_calls_without_an_encoding_are_found():
    source = 'p.read_text()\np.read_text(encoding="utf-8")\np.write_text("")\nrun(x, text=True)\n'
    assert list(calls_without_encoding(source)) == [1, 3, 4]


def test_encoding_of_text_is_named():
    folders = ("src", "tests", "docs", "benchmarks", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {path: list(calls_without_encoding(path.read_text(encoding="utf-8"))) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}
