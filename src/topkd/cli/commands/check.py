"""``topkd check``."""

from __future__ import annotations

import typer

from topkd.cli.options import Changes, RecipeName

PANEL = "Recipes"


def check(recipe: RecipeName, changes: Changes = None) -> None:
    """Validate every name and option of a recipe without running it."""
    from topkd.config import recipe as recipes
    from topkd.training.check import check as check_recipe
    from topkd.training.check import check_batches, found_taps
    from topkd.training.trial import try_losses

    loaded = recipes.load(recipe, changes or [])
    check_recipe(loaded)
    check_batches(loaded)
    try_losses(loaded)
    teacher = f", teacher {loaded.teacher.model}" if loaded.teacher else ""
    variants = ", ".join(loaded.variants)
    typer.echo(
        f"{loaded.name} is valid: student {loaded.student.model}{teacher}; variants {variants}"
    )
    for variant in loaded.variants:
        for line in loaded.schedule_warnings(variant):
            typer.echo(f"warning: {line}")
    for line in found_taps(loaded):
        typer.echo(line)
