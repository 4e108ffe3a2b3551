"""What the commands print: catalogs and tables, for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def catalog(what: str) -> list[dict[str, str]]:
    """Lists what recipes can name: ``recipes``, ``models``, ``losses`` or ``data``."""
    if what == "recipes":
        from topkd.config import recipe as recipes

        groups = sorted((name.rpartition("/")[0], name) for name in recipes.names())
        return [
            {"name": name, "about": recipes.about(name), "group": group} for group, name in groups
        ]
    if what == "losses":
        from topkd.losses import LOSSES

        about = {
            name: f"{loss.info.compares} ({loss.info.paper}); costs {loss.info.cost}"
            for name, loss in LOSSES.items()
        }
    elif what == "models":
        from topkd.models import MODELS

        about = {name: model.about for name, model in MODELS.items()}
    else:
        from topkd.data import DATA

        about = {name: _first_line(load) for name, load in DATA.items()}
    return [{"name": name, "about": told} for name, told in about.items()]


def print_findings(findings: Sequence[dict[str, str]]) -> None:
    """Prints what a doctor found."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"good": "green", "look": "yellow", "wrong": "bold red"}
    table = Table(box=None, pad_edge=False)
    for title in ("part", "found", "verdict", "what to change"):
        table.add_column(title, overflow="fold", no_wrap=title == "verdict")
    for finding in findings:
        verdict = Text(finding["verdict"], colors[finding["verdict"]])
        part, found, advice = (Text(finding[key]) for key in ("part", "found", "advice"))
        table.add_row(part, found, verdict, advice)
    Console(highlight=False).print(table)


def _first_line(function: object) -> str:
    """Reads what a function does off its docstring, without the marks of its markup."""
    return re.sub(r":\w+:|`", "", str(function.__doc__).splitlines()[0])


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """Prints the accuracies of finished runs, and of their teacher."""
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "seed", "top-1 %", "agreement %", "topological distance", box=None)
    taught_by = results[0].get("teacher")
    if taught_by:
        table.add_row("teacher", "", f"{taught_by['top1']:.2f}", "", "")
    for result in results:
        like = result.get("likeness", {})
        numbers = (
            f"{like[key]:.{digits}f}" if key in like else ""
            for key, digits in (("agreement", 2), ("topological_distance", 4))
        )
        row = (result["arm"], str(result["seed"]), f"{result['last']['top1']:.2f}", *numbers)
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(f"last epoch, on the {results[0]['judged_on']} images")
    console.print(table)


def print_files(config: dict[str, Any]) -> None:
    """Prints the files of an export, and how they compare with the network."""
    titles = ("file", "bytes", "top-1 %", "agreement %", "largest difference")
    rows, told = [titles], ""
    for name, file in config["files"].items():
        if file["checked_on"] != told:
            told = file["checked_on"]
            rows.append(("", "", "", "", ""))
            rows.append((f"the network, on {told}", "", _percent(file["network_top1"]), "", ""))
        numbers = _percent(file["top1"]), _percent(file["agreement"])
        rows.append((name, f"{file['bytes']:,}", *numbers, f"{file['largest_difference']:.1e}"))
    widths = [max(len(row[place]) for row in rows) for place in range(len(titles))]
    for row in rows:
        rest = "  ".join(
            f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)
        )
        print(f"{row[0]:<{widths[0]}}  {rest}".rstrip())


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
