"""Template of a study file."""

from __future__ import annotations

from collections.abc import Sequence

from topkd.config import recipe as recipes
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
    """Returns a study file that combines each loss with cross-entropy; the first is the baseline.

    Losses on features get a share of the gradient, so that no weight has to be tuned.

    Args:
        recipe: Name or path of a recipe.
        methods: Names of losses.
        seeds: Seeds in the format of a study file.

    Raises:
        RecipeError: If the recipe or a loss does not exist, a loss appears twice or is ce.
        ValueError: If the seeds are invalid.
    """
    recipes.load(recipe)
    read_seeds(seeds)
    for name in methods:
        if name not in LOSSES:
            raise RecipeError(f"--methods: there is no {name!r}{near(name, list(LOSSES))}")
        if name == "ce":
            raise RecipeError("--methods: ce is part of every variant; name the losses beside it")
        if methods.count(name) > 1:
            raise RecipeError(f"--methods: {name} appears twice")
    first, *others = methods
    lines = [f"  {first}: [{{name: ce}}, {{name: {first}}}]"]
    for name in others:
        if LOSSES[name].info.group == "logits":
            lines.append(f"  {name}: [{{name: ce}}, {{name: {name}}}]")
        else:
            lines.append(f"  {name}: {{add: [{{name: {name}, share: 0.1}}]}}")
    return TEMPLATE.format(
        count=len(methods),
        recipe=recipe,
        baseline=first,
        variants="\n".join(lines),
        seeds=seeds,
    )
