"""Text is UTF-8 whatever the locale, and what a terminal cannot show stops no command."""

import os
import subprocess
import sys

import pytest

from topkd import recipe

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
