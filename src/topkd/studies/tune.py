"""Search for the values of a recipe's options that are best on held-out training images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd.config.recipe import Recipe
from topkd.config.search import Range, Space, one_by_one, size, with_values
from topkd.config.validation import RecipeError, write_yaml
from topkd.evaluation.metrics import METRICS, Metric
from topkd.evaluation.results import Result, Run
from topkd.training.check import check, check_batches, check_metric, check_name
from topkd.training.experiment import Experiment
from topkd.training.trainer import OnEpoch, ignore_epoch
from topkd.training.trial import try_losses

if TYPE_CHECKING:
    import optuna

VALIDATION = 0.2  # fraction of the training images that is held out if the recipe holds out none
SEEDS = (100,)  # not among the first seeds, which final runs use
MOST_REPEATS = 100  # of values that were tried, one after another, before a search ends
MARK = "# Tuned from "  # first words of a tuned recipe
HEADER = """{mark}{source}: {score}, on held-out training images
#
# The best of {trials} trials ({complete} complete) at the last epoch, on held-out images
# ({validation:g} of the training images). Seeds of each trial: {seeds}.
# As the best of several, this value is optimistic: measure the recipe on the test images,
# with other seeds.
{values}
"""


@dataclass(frozen=True)
class Trial:
    """One combination of values and its result."""

    values: Mapping[str, Any]
    """Key -> value."""
    state: Literal["complete", "pruned", "failed"]
    score: float | None = None
    """Metric on the held-out images at the last epoch, mean over the seeds; None if incomplete."""
    note: str = ""
    """The epoch at which the trial was pruned, or the error."""


@dataclass(frozen=True)
class Tuned:
    """Result of :func:`tune`."""

    source: str
    """Name of the recipe that was tuned."""
    metric: Metric
    trials: Sequence[Trial]
    best: Trial
    recipe: Recipe
    """The recipe with the best values, without held-out images."""
    validation: float
    seeds: Sequence[int]

    def text(self) -> str:
        """Returns the recipe as YAML. Comments describe how its values were chosen."""
        values = self.best.values.items()
        header = HEADER.format(
            mark=MARK,
            source=self.source,
            score=f"{self.metric.title} {self.metric.format(self.best.score)} {self.metric.unit}",
            trials=len(self.trials),
            complete=sum(trial.state == "complete" for trial in self.trials),
            validation=self.validation,
            seeds=", ".join(map(str, self.seeds)),
            values="\n".join(f"#   {key}: {json.dumps(value)}" for key, value in values),
        )
        tree = self.recipe.model_dump(mode="json", exclude_unset=True, exclude={"name"})
        return header + write_yaml(tree)

    def as_json(self) -> dict[str, Any]:
        """Converts to plain values, without the recipe."""
        return {
            "recipe": self.source,
            "metric": self.metric.name,
            "validation": self.validation,
            "seeds": list(self.seeds),
            "best": asdict(self.best),
            "trials": [asdict(trial) for trial in self.trials],
        }


def tune(
    recipe: Recipe,
    space: Space,
    out: Path,
    progress: Progress,
    *,
    trials: int,
    seeds: Sequence[int] = SEEDS,
    metric: str = "top1",
    validation: float | None = None,
) -> Tuned:
    """Searches for the values of options that are best on held-out training images.

    Test images are not used. If there are at most ``trials`` combinations of values, all of them
    are tried; otherwise the tree-structured Parzen estimator suggests them. For top-1, a trial
    stops if its best accuracy so far is below the median of the earlier trials at this epoch. The
    search depends only on the arguments, so after an interruption the same call repeats its
    decisions and skips completed runs.

    Args:
        recipe: The recipe. Its controls are not trained.
        space: The values to try.
        out: Parent of the folder ``NAME-tuning``, with the teacher and the runs of all trials.
        progress: Shows progress and messages.
        trials: Maximum number of trials.
        seeds: Seeds of every trial. The first one is also the seed of the search.
        metric: Name of a metric, which is averaged over the seeds.
        validation: Fraction of the training images to hold out. Defaults to that of the recipe,
            or 0.2.

    Raises:
        ModuleNotFoundError: If optuna is not installed.
        RecipeError: If the metric, a key or a value is invalid.
        ValueError: If no trial is completed.

    References:
        Optuna: A Next-generation Hyperparameter Optimization Framework (Akiba et al., KDD 2019)
        https://arxiv.org/abs/1907.10902

    Examples:
        >>> from tempfile import mkdtemp
        >>> from topkd.config import recipe as recipes
        >>> small = ["student.model=resnet8x0.25", "epochs=1", "data.limit=100"]
        >>> recipe, quiet = recipes.load("digits/teacher", small), Progress(quiet=True)
        >>> rates = {"optimizer.lr": (0.01, 0.1)}
        >>> tuned = tune(recipe, rates, Path(mkdtemp()), quiet, trials=2)
        >>> len(tuned.trials), tuned.best.state, tuned.recipe.data.validation
        (2, 'complete', 0.0)
    """
    _optuna()
    share = (recipe.data.validation or VALIDATION) if validation is None else validation
    search = _Search(recipe, space, out / f"{recipe.name}-tuning", share, tuple(seeds), metric)
    first = search.check()
    if validation is None and not recipe.data.validation:
        progress.say(f"trials hold out {share:g} of the training images (data.validation is 0)")
    Experiment(first, search.folder, progress, trackers=()).train_teacher()
    search.run(trials, progress, epochs=first.epochs)
    scores = [trial.score for trial in search.trials if trial.score is not None]
    if not scores:
        reasons = ", ".join(dict.fromkeys(trial.note for trial in search.trials))
        raise ValueError(f"none of {len(search.trials)} trials is complete: {reasons}")
    found = METRICS[metric]
    top = max(scores) if found.higher_is_better else min(scores)
    best = next(trial for trial in search.trials if trial.score == top)
    chosen = with_values(recipe, best.values)
    return Tuned(recipe.name, found, search.trials, best, chosen, share, search.seeds)


def _readable(drawn: float, within: Range) -> float:
    """Rounds a number to a ten-thousandth of a range, at most, so that recipes are readable."""
    low, high = within.low, within.high
    narrowness = max(abs(low), abs(high)) / (high - low)
    digits = 4 + max(0, math.ceil(math.log10(narrowness)))
    return min(max(float(f"{drawn:.{digits}g}"), low), high)


def refuse_other_file(path: Path) -> None:
    """Raises ``FileExistsError`` if a file exists that is not a tuned recipe."""
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        raise FileExistsError(f"{path} exists and is not a tuned recipe; choose another name")


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        message = "topkd tune needs optuna: pip install 'topkd[search]'"
        raise ModuleNotFoundError(message, name="optuna") from error
    return optuna


@dataclass
class _Search:
    """Trials of a recipe and their results."""

    recipe: Recipe
    space: Space
    folder: Path
    validation: float
    seeds: tuple[int, ...]
    metric: str
    trials: list[Trial] = field(default_factory=list)

    def recipe_of(self, values: Mapping[str, Any]) -> Recipe:
        """Returns the recipe of a trial, named after the hash of its settings."""
        chosen = with_values(self.recipe, values)
        data = chosen.data.model_copy(update={"validation": self.validation})
        evaluation = (self.metric,) if METRICS[self.metric].on_request else ()
        of_trials = {"data": data, "controls": {}, "evaluation": evaluation}
        trial = chosen.model_copy(update=of_trials)
        return trial.model_copy(update={"name": f"trials/{trial.hash}"})

    def check(self) -> Recipe:
        """Checks the metric and every value of every key, and returns the recipe of the first."""
        check_name(METRICS, self.metric, "--metric")
        check_metric(self.metric, "--metric", has_teacher=self.recipe.teacher is not None)
        if not 0 < self.validation < 1:
            raise RecipeError(f"--validation: expected a fraction below 1, got {self.validation:g}")
        found = [(key, self.recipe_of(values)) for key, values in one_by_one(self.space)]
        for _, recipe in found:
            check(recipe)
            check_batches(recipe)
            try_losses(recipe)
        for key in self.space:
            recipes = [recipe for of, recipe in found if of == key]
            if len({recipe.hash for recipe in recipes}) < len(recipes):
                raise RecipeError(f"{key}: two values have the same effect on a trial")
        return found[0][1]

    def run(self, most: int, progress: Progress, *, epochs: int) -> None:
        """Runs trials until there are ``most`` of them, or nothing new is suggested.

        Args:
            most: Maximum number of trials.
            progress: Shows progress.
            epochs: Usual number of epochs of a run.
        """
        study, each, repeats = self._study(most, epochs), epochs * len(self.seeds), 0
        combinations = size(self.space)
        total = most if combinations is None else min(most, combinations)
        with progress.bar(f"tuning {self.recipe.name}", total * each, "epochs") as advance:
            while len(self.trials) < total and repeats < MOST_REPEATS:
                before, left = len(self.trials), each

                def on_epoch() -> None:
                    nonlocal left
                    advance(min(left, 1), "")
                    left -= min(left, 1)

                study.optimize(lambda trial: self._objective(trial, on_epoch), n_trials=1)
                repeats = 0 if len(self.trials) > before else repeats + 1
                if len(self.trials) > before:
                    advance(left, f"trial {len(self.trials)} of {total}, {self._news()}")

    def _study(self, most: int, epochs: int) -> optuna.Study:
        optuna, combinations = _optuna(), size(self.space)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if combinations is None or combinations > most:
            sampler = optuna.samplers.TPESampler(seed=self.seeds[0])
        else:
            grid = {key: range(len(values)) for key, values in self._lists()}
            sampler = optuna.samplers.GridSampler(grid, seed=self.seeds[0])
        pruner = optuna.pruners.NopPruner()
        if self.metric == "top1":
            pruner = optuna.pruners.MedianPruner(n_warmup_steps=epochs // 3)
        direction = "maximize" if METRICS[self.metric].higher_is_better else "minimize"
        return optuna.create_study(sampler=sampler, pruner=pruner, direction=direction)

    def _objective(self, trial: optuna.Trial, on_epoch: Callable[[], None]) -> float:
        """Runs a trial, or returns the score of an earlier one with the same values."""
        pruned, values = _optuna().TrialPruned, self._suggest(trial)
        for earlier in self.trials:
            if earlier.values == values:  # TPE repeats itself
                trial.study.enqueue_trial(self._untried())
                if earlier.score is None:
                    raise pruned
                return earlier.score
        recipe = self.recipe_of(values)
        self._refuse_other_teacher(recipe)
        try:
            scores = [self._score(recipe, seed, trial, on_epoch) for seed in self.seeds]
        except pruned as stop:
            self.trials.append(Trial(values, "pruned", note=str(stop)))
            raise
        except ValueError as error:  # such as a diverged loss
            self.trials.append(Trial(values, "failed", note=str(error).splitlines()[0]))
            raise pruned from error
        self.trials.append(Trial(values, "complete", sum(scores) / len(scores)))
        return sum(scores) / len(scores)

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        values = dict[str, Any]()
        for key, candidates in self.space.items():
            if isinstance(candidates, Range):
                low, high, log = candidates.low, candidates.high, candidates.is_logarithmic
                drawn = trial.suggest_float(key, low, high, log=log)
                values[key] = _readable(drawn, candidates)
            else:
                values[key] = candidates[trial.suggest_categorical(key, range(len(candidates)))]
        return values

    def _untried(self) -> dict[str, int]:
        """Draws positions of values that have not been tried together."""
        generator = np.random.default_rng([self.seeds[0], len(self.trials)])
        while True:
            drawn = {key: int(generator.integers(len(values))) for key, values in self._lists()}
            values = {key: values[drawn[key]] for key, values in self._lists()}
            if values not in [trial.values for trial in self.trials]:
                return drawn

    def _lists(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [(key, each) for key, each in self.space.items() if not isinstance(each, Range)]

    def _score(
        self, recipe: Recipe, seed: int, trial: optuna.Trial, on_epoch: Callable[[], None]
    ) -> float:
        """Runs one seed of a trial, unless it is finished, and returns the metric.

        Raises:
            optuna.TrialPruned: If the run of the first seed is worse than the median.
        """

        def report(entry: Mapping[str, Any]) -> None:
            on_epoch()
            if seed == self.seeds[0] and "validation_top1" in entry:
                trial.report(entry["validation_top1"], entry["epoch"])

        def report_and_prune(entry: Mapping[str, Any]) -> None:
            report(entry)
            if seed == self.seeds[0] and entry["epoch"] < recipe.epochs and trial.should_prune():
                raise _optuna().TrialPruned(f"after epoch {entry['epoch']}")

        experiment = self._experiment(recipe, on_epoch=report_and_prune)
        done, history = processes.by_first(lambda: _finished(experiment, seed))
        for entry in history:
            report(entry)
        result = Result.model_validate(done or experiment.train_student(seed))
        value = result.metric(self.metric)
        if value is None:
            raise ValueError(f"{self.metric} is undefined for {experiment.folder}")
        return value

    def _experiment(self, recipe: Recipe, on_epoch: OnEpoch = ignore_epoch) -> Experiment:
        quiet = Progress(quiet=True)
        return Experiment(recipe, self.folder, quiet, trackers=(), on_epoch=on_epoch)

    def _refuse_other_teacher(self, recipe: Recipe) -> None:
        """Raises ``ValueError`` if a finished run of a trial had another teacher.

        This ends the search: the trials would be compared across teachers.
        """
        experiment = self._experiment(recipe)
        processes.by_first(lambda: [experiment.finished(seed) for seed in self.seeds])

    def _news(self) -> str:
        """Describes the last trial in a line."""
        metric, trial = METRICS[self.metric], self.trials[-1]
        values = ", ".join(f"{key}={json.dumps(value)}" for key, value in trial.values.items())
        if trial.score is None:
            return f"{values}: {trial.state} {trial.note}"
        return f"{values}: {metric.title} {metric.format(trial.score)}"


def _finished(
    experiment: Experiment, seed: int
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Reads the result of a finished run and its metrics per epoch."""
    result, folder = experiment.finished(seed), experiment.run_folder(seed)
    return result, [] if result is None else Run(Result.model_validate(result), folder).history
