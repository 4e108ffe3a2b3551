"""Runs the quick tests in this environment and writes `docs/versions.md`: `make minimum`."""

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

TOOLS = {"mypy", "ruff", "types-pyyaml"}  # no test runs them
OF_THIS_PAGE = "tests/test_packaging.py::test_lower_bounds_are_the_versions_that_were_tested"
PAGE = """# Supported versions

Written by `make minimum`. It installs the oldest version of each dependency that `pyproject.toml`
allows, those of the extras included, and runs the quick tests.

Python {python} on {system}: {result}.

| package | oldest version |
|---|---|
{rows}
"""


def page(result: str) -> str:
    """The page for the versions that are installed here."""
    names = {re.match(r"[\w.-]+", needed)[0].lower() for needed in metadata.requires("topkd")}
    tested = sorted(names - TOOLS)
    rows = "\n".join(f"| {name} | {metadata.version(name)} |" for name in tested)
    return PAGE.format(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        result=result,
        rows=rows,
    )


if __name__ == "__main__":
    command = [sys.executable, "-m", "pytest", "-q", "--deselect", OF_THIS_PAGE, *sys.argv[1:]]
    tests = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    line = ""
    for line in tests.stdout:
        print(line, end="", flush=True)
    if tests.wait():
        sys.exit(1)
    counted = re.sub(r" in [\d.]+s.*", "", line.strip(" =\n"))
    Path(__file__).with_suffix(".md").write_text(page(counted), encoding="utf-8")
