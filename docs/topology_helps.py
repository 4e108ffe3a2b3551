"""Writes the results of the experiment on topology into docs/topology-helps.md, and their pages.

python docs/topology_helps.py

Everything is computed from the files in results/topology.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from topkd._io import files
from topkd._io.progress import Progress
from topkd.config import study as studies
from topkd.evaluation.metrics import METRICS
from topkd.evaluation.statistics import Sample
from topkd.reporting.plots.rendering import to_png
from topkd.reporting.plots.variants import looks
from topkd.reporting.sections import fixed
from topkd.studies import figures, report, sentences
from topkd.studies.analysis import Comparison, compare
from topkd.studies.collect import Collected, collect, primary_metric
from topkd.studies.plan import Place
from topkd.studies.table import markdown

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "results/topology"
STUDIES = DOCS.parent / "studies/topology"
PAGE, HEADING = DOCS / "topology-helps.md", "## Results\n"
SETTINGS = {"S1": ("digits", "digits")}  # name -> study file, title
TOPOLOGICAL = (
    "ripsnet",
    "ripsnet-published",
    "image",
    "wasserstein",
    "edges",
    "rtd",
    "ultrametric",
)
CONTROLS = {  # what is asked -> ending of the control's name
    "critical edges against random edges": "-random",
    "this teacher against its features of other images": "-other",
    "this teacher against its permuted features": "-permuted",
}
NOTHING_YET = "No setting is finished.\n"


def finished() -> Iterator[tuple[str, str, Collected, Place]]:
    """Yields the settings that have results: name, title, jobs and their folders."""
    for name, (file, title) in SETTINGS.items():
        path = STUDIES / f"{file}.yaml"
        if not path.exists() or not (RESULTS / file).is_dir():
            continue
        place = Place(RESULTS)
        study = collect(studies.load(path), place)
        counts = [sentences.done(study, setting) for setting in study.plan.settings]
        if all(done == jobs for done, jobs in counts):
            yield name, title, study, place


def against(study: Collected, setting: str, pairs: Mapping[str, str]) -> list[Comparison]:
    """Compares variants with their controls: variant -> control. All intervals hold together."""
    metric = primary_metric(study.plan)
    values = study.values(setting, metric)
    differences = {
        variant: {
            seed: value - values[control][seed]
            for seed, value in values[variant].items()
            if seed in values[control]
        }
        for variant, control in pairs.items()
    }
    none = dict.fromkeys(study.plan.file.all_seeds, 0.0)
    margin, higher = study.plan.file.primary.margin, metric.higher_is_better
    return compare(
        setting, {"none": none, **differences}, "none", margin=margin, higher_is_better=higher
    )


def interval(comparison: Comparison, digits: int) -> str:
    """Formats a difference with its interval."""
    low, high = comparison.interval or (float("nan"),) * 2
    ends = [fixed(value, f"+.{digits}f") for value in (comparison.differences.mean, low, high)]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def controls(study: Collected, setting: str) -> list[str]:
    """Tabulates every topological variant against its controls, and against scale and distances."""
    variants = study.plan.variants
    lines = ["| question | variant | difference, points | verdict |", "|---|---|--:|---|"]
    asked = {
        question: {v: f"{v}{ending}" for v in TOPOLOGICAL if f"{v}{ending}" in variants}
        for question, ending in CONTROLS.items()
    }
    for other in ("scale", "distances"):
        asked[f"topology against {other}"] = {v: other for v in TOPOLOGICAL if v in variants}
    for question, pairs in asked.items():
        for each in against(study, setting, pairs):
            lines.append(
                f"| {question} | `{each.variant}` | {interval(each, 2)} | {each.verdict} |"
            )
    return lines


def distances(study: Collected, setting: str) -> list[str]:
    """Tabulates the change of the topological distance beside that of the accuracy."""
    primary, values = (
        study.comparisons(setting),
        study.values(setting, METRICS["topological_distance"]),
    )
    changed = {
        each.variant: each
        for each in compare(setting, values, study.plan.file.baseline, higher_is_better=False)
    }
    lines = ["| variant | topological distance | top-1, points |", "|---|--:|--:|"]
    for each in primary:
        if each.variant in changed:
            distance = interval(changed[each.variant], 4)
            lines.append(f"| `{each.variant}` | {distance} | {interval(each, 2)} |")
    return lines


def endpoints(study: Collected, setting: str) -> list[str]:
    """Tabulates the secondary endpoints: mean and standard deviation over seeds."""
    measured = {m: v for m in METRICS.values() if (v := study.values(setting, m))}
    lines = ["| variant | " + " | ".join(m.heading for m in measured) + " |"]
    lines.append("|---" + "|--:" * len(measured) + "|")
    for variant in study.plan.variants:
        cells = [
            format(Sample(tuple(values[variant].values())), f".{metric.digits}f")
            if variant in values
            else "–"
            for metric, values in measured.items()
        ]
        lines.append(f"| `{variant}` | " + " | ".join(cells) + " |")
    return lines


def published(study: Collected, setting: str) -> str:
    """Describes the approximated term: share of the gradient and fidelity, mean over seeds."""
    parts = []
    for variant in ("ripsnet", "ripsnet-published"):
        runs = study.results.get((setting, variant), {}).values()
        shares = Sample(tuple(100 * run["gradient_share"]["added"] for run in runs))
        fidelities = [run["loss_metadata"]["added"]["fidelity"] for run in runs]
        explained = Sample(tuple(100 * fidelity["r2"] for fidelity in fidelities))
        parts.append(
            f"`{variant}` carries {shares:.2f} % of the gradient at the last epoch, and its "
            f"RipsNet explains {explained:.0f} % of the variance between clouds"
        )
    return f"{'; '.join(parts)} (mean ± std)."


def all_controls_fail(variant: str, by_name: Mapping[str, Comparison]) -> bool:
    """Tests whether a variant has controls, and none of them is better than the baseline."""
    controls = [by_name[n] for e in CONTROLS.values() if (n := f"{variant}{e}") in by_name]
    return bool(controls) and all(each.verdict != "better" for each in controls)


def answer(found: Sequence[tuple[str, str, Collected, Place]]) -> str:
    """States the answer, with the smallest effect that the data exclude."""
    parts = []
    for name, title, study, _ in found:
        (setting,) = study.plan.settings
        by_name = {each.variant: each for each in study.comparisons(setting)}
        terms = [by_name[variant] for variant in TOPOLOGICAL if variant in by_name]
        better = [each for each in terms if each.verdict == "better"]
        count = min(each.differences.n for each in terms)
        held = [each.variant for each in better if all_controls_fail(each.variant, by_name)]
        most = max(each.interval[1] for each in terms)
        if held:
            clause = f"{', '.join(held)} help, and their controls do not"
        elif better:
            names = ", ".join(each.variant for each in better)
            clause = (
                f"{names} are better than tuned KD, but so are their controls, or they have none"
            )
        else:
            clause = (
                f"no topological term is better than tuned KD, and a gain of more than "
                f"{most:.2f} points is excluded for all {len(terms)} of them"
            )
        parts.append(f"On {title} ({name}, n = {count}), {clause}.")
        others = [
            f"`{each.variant}` ({interval(each, 2)} points)"
            for each in by_name.values()
            if each.verdict == "better" and each.variant not in TOPOLOGICAL
        ]
        if others:
            parts.append(f"Better than tuned KD: the control {' and '.join(others)}.")
    return " ".join(parts)


def section(name: str, title: str, study: Collected, place: Place) -> list[str]:
    """Writes the results of one setting and its page."""
    (setting,), metric = study.plan.settings, primary_metric(study.plan)
    folder, file = DOCS / "topology-helps", study.plan.file
    style = figures.Style(
        metric, file.baseline, file.primary.margin, looks(study.plan.variants, file.baseline)
    )
    chart = figures.setting_forest(setting, study.comparisons(setting), style)
    files.write(folder / f"{file.name}.png", to_png(chart.figure))
    report.write_report(study, place, folder / f"{file.name}.html", Progress(quiet=True))
    return [
        f"### {name}: {title}",
        "",
        f"{sentences.progress(study, place)} {sentences.finding(study, setting)}",
        "",
        f"![Differences to tuned KD](topology-helps/{file.name}.png)",
        "",
        f"[The page of this setting](topology-helps/{file.name}.html) has all figures and details.",
        "",
        markdown(study),
        "**Controls.** Differences of a variant to its control, paired by seed; the intervals of",
        "one question hold together.",
        "",
        *controls(study, setting),
        "",
        "**Does a term do what it is asked?** Differences to tuned KD of the topological",
        "distance to the teacher, and of the accuracy.",
        "",
        *distances(study, setting),
        "",
        "**The paper's own term.** " + published(study, setting),
        "",
        "**All endpoints.**",
        "",
        *endpoints(study, setting),
        "",
    ]


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    plan = text.partition(HEADING)[0].rstrip()
    found = list(finished())
    lines = [plan, "", HEADING]
    if found:
        lines += [f"**{answer(found)}**", ""]
        for each in found:
            lines += section(*each)
    else:
        lines.append(NOTHING_YET)
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
