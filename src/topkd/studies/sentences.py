"""The findings of a study in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from topkd.config.study import Plan
from topkd.evaluation.metrics import Metric
from topkd.evaluation.results import MADE_WITH
from topkd.reporting.sections import count, fixed
from topkd.studies.analysis import Comparison, Verdict
from topkd.studies.collect import Collected, primary_metric
from topkd.studies.plan import Place

SYMBOLS: Mapping[Verdict, str] = {
    "better": "▲",
    "worse": "▼",
    "no difference that matters": "≈",
    "undecided": "?",
}
NAMED = 3  # variants named in a sentence; the others are counted


def selection(plan: Plan) -> str | None:
    """Says that variants of a study were selected; None if all of them are shown."""
    chosen = len(plan.variants) - 1
    if chosen == plan.compared:
        return None
    return (
        f"Selected: {chosen} of the {plan.compared} variants besides {plan.file.baseline}. "
        "Intervals and p-values are those of the whole study."
    )


def progress(study: Collected, place: Place) -> str:
    """Counts the jobs that are done, and those that were started and have no result."""
    jobs = study.plan.jobs()
    missing = [
        job for job in jobs if job.seed not in study.results.get((job.setting, job.variant), {})
    ]
    started = sum(place.run(job).is_dir() for job in missing)
    if not missing:
        return f"All {count(len(jobs), 'job')} are done." if len(jobs) > 1 else "The job is done."
    line = f"Incomplete: {len(jobs) - len(missing)} of {len(jobs)} jobs are done"
    if started:
        line += f"; {started} of the others {'were' if started > 1 else 'was'} started"
    return f"{line}."


def done(study: Collected, setting: str) -> tuple[int, int]:
    """Returns the number of finished jobs of a setting, and of all its jobs."""
    finished = [len(study.results.get((setting, variant), {})) for variant in study.plan.variants]
    return sum(finished), len(finished) * len(study.plan.file.all_seeds)


def finding(study: Collected, setting: str) -> str:
    """Summarizes the comparisons of a setting in one sentence."""
    metric, baseline = primary_metric(study.plan), study.plan.file.baseline
    finished, jobs = done(study, setting)
    name = setting if finished == jobs else f"{setting} ({finished} of {jobs} jobs)"
    if problem := study.without_baseline(setting):
        return f"{name}: {problem}."
    comparisons = study.comparisons(setting)
    if not comparisons:
        return f"{name}: no variant shares a seed with the baseline {baseline}."
    return f"{name}: {'; '.join(clauses(comparisons, baseline, metric))}."


def cautions(study: Collected, setting: str) -> list[str]:
    """Lists reasons why the runs of a setting may not be comparable."""
    runs = [
        result
        for variant in study.plan.variants
        for result in study.results.get((setting, variant), {}).values()
    ]
    teachers = {run["teacher"]["hash"] for run in runs if run.get("teacher")}
    found = []
    if len(teachers) > 1:
        found.append(f"These runs have {len(teachers)} different teachers.")
    for name in MADE_WITH:
        values = counted(run["environment"].get(name) for run in runs)
        if len(values) > 1:
            found.append(f"These runs differ in {name}: {listed(values)}.")
    return found


def counted(values: Iterable[object]) -> Counter[str]:
    """Counts the values of a property of runs."""
    return Counter("unknown" if value is None else str(value) for value in values)


def listed(values: Counter[str]) -> str:
    """Lists the values of a property of runs, with the numbers of runs if there are several."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count(number, 'run')})" for value, number in values.items())


def clauses(comparisons: Sequence[Comparison], baseline: str, metric: Metric) -> list[str]:
    """Describes comparisons with a baseline: differences by name, other verdicts by number."""
    by_verdict: dict[Verdict, list[Comparison]] = {
        verdict: [each for each in comparisons if each.verdict == verdict] for verdict in SYMBOLS
    }
    found = []
    for verdict in ("better", "worse"):
        ranked = sorted(by_verdict[verdict], key=lambda each: -abs(each.differences.mean))
        found += [
            f"{each.variant} is {verdict} than {baseline} by {_amount(each, metric)}"
            for each in ranked[:NAMED]
        ]
        if rest := ranked[NAMED:]:
            found.append(f"{len(rest)} more {'are' if len(rest) > 1 else 'is'} {verdict}")
    if same := len(by_verdict["no difference that matters"]):
        verb = "show" if same > 1 else "shows"
        found.append(f"{count(same, 'variant')} {verb} no difference that matters")
    if by_verdict["undecided"]:
        found.append(_undecided(by_verdict["undecided"]))
    return found


def _amount(comparison: Comparison, metric: Metric) -> str:
    """Formats the size of a decided difference with its interval."""
    assert comparison.interval is not None
    sign = 1 if comparison.differences.mean > 0 else -1
    spec = f".{metric.digits}f"
    low, high = sorted(sign * end for end in comparison.interval)
    unit = " points" if metric.unit == "%" else f" {metric.unit}".rstrip()
    return (
        f"{abs(comparison.differences.mean):{spec}}{unit} "
        f"(95 % {fixed(low, spec)} to {fixed(high, spec)}, n = {comparison.differences.n})"
    )


def _undecided(comparisons: Sequence[Comparison]) -> str:
    verb = "are" if len(comparisons) > 1 else "is"
    line = f"{count(len(comparisons), 'variant')} {verb} undecided"
    known = [each.needed for each in comparisons if each.needed is not None]
    if known:
        which = "the first" if len(comparisons) > 1 else "it"
        return f"{line} (about {min(known)} seeds would decide {which})"
    return f"{line} (more seeds are needed to see the spread of the differences)"
