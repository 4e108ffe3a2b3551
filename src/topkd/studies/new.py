"""Template of a study file."""

from __future__ import annotations

from collections.abc import Sequence

from topkd.config import recipe as recipes
from topkd.config.recipe import Recipe
from topkd.config.seeds import read_seeds
from topkd.config.validation import RecipeError, near
from topkd.losses import LOSSES

TEMPLATE = """# {count} variants of the recipe {recipe}, seeds {seeds}; `topkd study run` runs them.
recipe: {recipe}
set: {{}}                       # changes to the recipe in every run, e.g. {{epochs: 20}}
baseline: {baseline}
variants:
{variants}
settings: {{main: {{}}}}          # name -> changes; variants are compared within a setting
seeds: {seeds}
primary: {{metric: top1}}       # margin: the smallest difference that matters
"""


def template(recipe: str, methods: Sequence[str], seeds: str) -> str:
    """Returns a study file with one variant per loss; the first one is the baseline.

    The baseline and losses on logits are combined with cross-entropy. All other losses are added to
    the terms of the baseline, with a share of the gradient, so that no weight has to be tuned. A
    loss that replaces the student's classifier gets the change of the recipe that it needs.

    Args:
        recipe: Name or path of a recipe.
        methods: Names of losses.
        seeds: Seeds in the format of a study file.

    Raises:
        RecipeError: If the recipe or a loss does not exist, a loss appears twice or is ce, or the
            first one replaces the student's classifier.
        ValueError: If the seeds are invalid.
    """
    loaded = recipes.load(recipe)
    read_seeds(seeds)
    for name in methods:
        if name not in LOSSES:
            raise RecipeError(f"--methods: there is no {name!r}{near(name, list(LOSSES))}")
        if name == "ce":
            raise RecipeError("--methods: ce is part of every variant; name the losses beside it")
        if methods.count(name) > 1:
            raise RecipeError(f"--methods: {name} appears twice")
    first, *others = methods
    if LOSSES[first].replaces_classifier:
        raise RecipeError(
            f"--methods: {first} replaces the student's classifier, so it cannot be the baseline, "
            "whose terms the other variants share; name another loss first"
        )
    lines = [f"  {first}: [{{name: ce}}, {{name: {first}}}]"]
    lines += [_variant(name, loaded) for name in others]
    return TEMPLATE.format(
        count=len(methods),
        recipe=recipe,
        baseline=first,
        variants="\n".join(lines),
        seeds=seeds,
    )


def _variant(name: str, recipe: Recipe) -> str:
    """Returns the line of a variant that is not the baseline."""
    loss = LOSSES[name]
    if loss.info.group == "logits":
        return f"  {name}: [{{name: ce}}, {{name: {name}}}]"
    changes = []
    if loss.replaces_classifier:
        changes.append("student.classifier: teacher")
    if loss.reads_maps and recipe.teacher is not None and recipe.teacher.cache:
        changes.append("teacher.cache: false")  # it stores no feature maps
    changed = f", set: {{{', '.join(changes)}}}" if changes else ""
    return f"  {name}: {{add: [{{name: {name}, share: 0.1}}]{changed}}}"
