"""Sections of a report: figures of finished runs with their captions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from topkd._io import files
from topkd.evaluation import metrics
from topkd.evaluation.results import Fidelity, Run, Study
from topkd.evaluation.statistics import Sample
from topkd.losses.base import MIN_GRADIENT_SHARE
from topkd.models import checkpoint
from topkd.reporting import plots
from topkd.reporting.plots import style
from topkd.topology.approximation import MIN_R2, Approximation, cut_clouds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOUDS = 4  # number of clouds shown per approximator
NO_METRICS = "No curves: metrics.jsonl is missing."
NO_EXAMPLES = "examples.safetensors of student or teacher is missing."


@dataclass(frozen=True)
class Picture:
    """A figure with its alternative text."""

    figure: Figure
    alt: str
    raster: bool = False  # PNG instead of SVG, for many marks


@dataclass(frozen=True)
class Section:
    """A section of the report on one recipe; the template has its heading and explanation."""

    name: str
    sentences: Sequence[str] = ()
    warnings: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    missing: Sequence[str] = ()  # what is missing, and why
    legend: Mapping[str, str] = field(default_factory=dict)  # label -> color


def training(study: Study) -> Section:
    """Plots accuracy and every loss term over the epochs, for all variants."""
    runs = {
        variant: [run.history for run in seeds.values() if run.history]
        for variant, seeds in study.variants.items()
    }
    runs = {variant: histories for variant, histories in runs.items() if histories}
    if not runs:
        return Section("training", missing=[NO_METRICS])
    colors, eval_split = plots.palette(list(study.variants)), study.first.result.eval_split
    accuracies = {
        variant: [
            [entry.get(f"{eval_split}_top1", math.nan) for entry in history]  # not every epoch
            for history in histories
        ]
        for variant, histories in runs.items()
    }
    figure = plots.curves(
        accuracies, title="Accuracy", ylabel=f"{eval_split} accuracy, %", colors=colors
    )
    pictures = [Picture(figure, f"{eval_split} accuracy over the epochs of {', '.join(runs)}")]
    losses = {variant: _over_epochs(histories, "losses") for variant, histories in runs.items()}
    for term in dict.fromkeys(term for terms in losses.values() for term in terms):
        values = {variant: terms[term] for variant, terms in losses.items() if term in terms}
        figure = plots.curves(
            values, title=term, ylabel="loss, unweighted", colors=colors, wide=True
        )
        pictures.append(Picture(figure, f"loss {term} over the epochs of {', '.join(values)}"))
    return Section("training", pictures=pictures)


def _over_epochs(
    histories: Sequence[Sequence[Mapping[str, Any]]], kind: str
) -> dict[str, list[list[float]]]:
    """Returns the values of each term per seed and epoch; NaN while the term is inactive."""
    terms = dict.fromkeys(term for history in histories for e in history for term in e[kind])
    return {
        term: [[entry[kind].get(term, math.nan) for entry in history] for history in histories]
        for term in terms
    }


def faint_terms(study: Study) -> list[str]:
    """Warns of weighted terms with a negligible gradient share at the last epoch."""
    warnings = []
    for variant, seeds in study.variants.items():
        weighted = [t.title for t in next(iter(seeds.values())).result.losses if t.weight]
        for term, share in _last_shares(seeds).items():
            if term in weighted and share.mean < MIN_GRADIENT_SHARE:
                warnings.append(
                    f"In {variant}, the term {term} carries {percent(share.mean)} of the gradient "
                    f"at the last epoch (mean of {count(share.n, 'seed')}). Below "
                    f"{percent(MIN_GRADIENT_SHARE)} a term hardly moves the student, whatever it "
                    "measures: a difference between the runs does not speak for or against it."
                )
    return warnings


def _last_shares(seeds: Mapping[int, Run]) -> dict[str, Sample]:
    """Returns the gradient share of each term at the last epoch, over the seeds of a variant."""
    results = [run.result for run in seeds.values()]
    return {
        term: Sample(tuple(r.gradient_share[term] for r in results if term in r.gradient_share))
        for term in results[0].gradient_share
    }


def gradients(study: Study) -> Section | None:
    """Plots the gradient share of each term, for variants with several terms."""
    shares = {variant: _last_shares(seeds) for variant, seeds in study.variants.items()}
    shares = {variant: terms for variant, terms in shares.items() if len(terms) > 1}
    if not shares:
        return None
    over_epochs = {}
    for variant in shares:
        histories = [run.history for run in study.variants[variant].values() if run.history]
        over_epochs[variant] = _over_epochs(histories, "gradient_share")
    names = list({term: None for terms in over_epochs.values() for term in terms})
    colors = plots.palette(names, style.TERMS)
    pictures, sentences = [], []
    for variant, last in shares.items():
        listed = ", ".join(f"{term} {percent(share.mean)}" for term, share in last.items())
        seeds = count(len(study.variants[variant]), "seed")
        place = next(iter(study.variants[variant].values())).result.gradient_at
        where = "" if place == "embedding" else f", at the {place}"
        sentences.append(f"{variant}{where}, last epoch, mean of {seeds}: {listed}.")
        if terms := over_epochs[variant]:
            figure = plots.gradient_shares(terms, title=variant, colors=colors)
            alt = f"share of the gradient of {', '.join(terms)} in {variant}"
            pictures.append(Picture(figure, alt))
    missing = [] if pictures else [NO_METRICS]
    return Section("gradients", sentences, faint_terms(study), pictures, missing)


def _shown(study: Study) -> dict[str, Run]:
    """Selects one run of the baseline and one of the last variant, with the same seed."""
    main = list(study.variants)[-1]
    variants = [main] if study.baseline in (None, main) else [str(study.baseline), main]
    kept = {
        variant: {s: r for s, r in study.variants[variant].items() if r.examples}
        for variant in variants
    }
    if not all(kept.values()):
        return {}
    common = set.intersection(*(set(seeds) for seeds in kept.values()))
    return {variant: seeds[min(common or seeds)] for variant, seeds in kept.items()}


def _embeddings(study: Study) -> tuple[dict[str, Tensor], Tensor] | None:
    """Returns the embeddings of the teacher and of the selected runs, and the labels."""
    runs = _shown(study)
    if not runs or not all("teacher" in run.examples for run in runs.values()):
        return None
    first = next(iter(runs.values()))
    embeddings = {f"teacher, {_teacher(first)}": first.examples["teacher"]}
    embeddings |= {
        f"{variant}, seed {run.result.seed}": run.examples["student"]
        for variant, run in runs.items()
    }
    target = first.examples["target"]
    if any(len(embedding) != len(target) for embedding in embeddings.values()):
        return None  # runs evaluated on different images are not comparable
    return embeddings, target


def _teacher(run: Run) -> str:
    return "" if run.result.teacher is None else run.result.teacher.model


def shape(study: Study) -> Section | None:
    """Plots the H0 diagrams of teacher, baseline and student for one cloud of evaluation images."""
    if study.first.result.teacher is None:
        return None
    sentences = _distances(study)
    found = _embeddings(study)
    size = study.cloud_size
    if found is None or len(found[1]) < size:
        reason = NO_EXAMPLES if found is None else f"fewer than {size} images are stored."
        return Section("shape", sentences, missing=[f"No diagrams: {reason}"])
    deaths = {}
    for name, embedding in found[0].items():
        cloud = _clouds(embedding, size)[0]
        deaths[name] = metrics.relative_diagrams(cloud, size).deaths[0].numpy()
    end = max(float(values.max()) for values in deaths.values())
    colors = dict(zip(deaths, (style.TEACHER, *plots.COLORS), strict=False))
    unit = "mean = 1"
    pictures = [
        Picture(
            plots.barcode(values, title=name, end=end, unit=unit, color=colors[name]),
            f"bars of the H0 diagram of {name}, {size} {study.first.result.eval_split} images",
        )
        for name, values in deaths.items()
    ]
    together = plots.sorted_deaths(deaths, title="Together", unit=unit, colors=colors)
    pictures.append(Picture(together, f"sorted bar lengths of {', '.join(deaths)}"))
    return Section("shape", sentences, pictures=pictures)


def _distances(study: Study) -> list[str]:
    metric = metrics.METRICS["topological_distance"]
    spec, measured = f".{metric.digits}f", study.metric(metric.name)
    listed = ", ".join(
        f"{variant} {Sample(tuple(values.values())):{spec}}"
        for variant, values in measured.items()
        if values
    )
    if not listed:
        return []
    sentences = [
        f"Topological distance to the teacher, over all clouds of {study.first.result.eval_split} "
        f"images: {listed}."
    ]
    for variant, found in study.compare(metric.name).items():
        if found is not None and found.interval is not None:
            ends = " to ".join(fixed(end, f"+{spec}") for end in found.interval)
            low, high = found.interval
            sentences.append(
                f"Paired by seed, {variant} is {abs(found.mean):{spec}} "
                f"{'closer' if found.mean < 0 else 'farther'} than {study.baseline} (95 % interval "
                f"of the difference {ends}, {count(found.n, 'seed')}, not corrected for the number "
                f"of variants){', which includes 0.' if low <= 0 <= high else '.'}"
            )
    return sentences


def _clouds(embedding: Tensor, size: int) -> Tensor:
    """Cuts random clouds, which hold the same images for every network."""
    return cut_clouds(embedding, size, torch.Generator().manual_seed(0))


def fidelities(study: Study) -> dict[str, Fidelity]:
    """Collects the fidelity of the approximators of a study: term and variant -> numbers."""
    found: dict[str, Fidelity] = {}
    for run in study.runs:
        for term, metadata in run.result.loss_metadata.items():
            fidelity = metadata.fidelity
            if fidelity is not None and fidelity not in found.values():
                found[f"{term} in {run.result.variant}"] = fidelity
    return found


def poor_approximators(study: Study) -> list[str]:
    """Warns of approximators that explain less than half of the variance between clouds."""
    return [
        f"The approximator of {name} has R² {fixed(fidelity.r2, '.2f')}, below {MIN_R2}: "
        "it misses more than half of what differs between clouds, so that this run says little "
        "about topology. The option via: exact computes the real thing, and faster."
        for name, fidelity in fidelities(study).items()
        if fidelity.r2 < MIN_R2
    ]


def images(study: Study) -> Section | None:
    """Plots exact persistence images of the teacher's embeddings above the approximated ones."""
    known = fidelities(study)
    if not known:
        return None
    sentences = [
        f"Approximator of {name}: R² {fixed(f.r2, '.2f')} on {f.clouds} held-out clouds, where 1 "
        "is exact and 0 is no better than the mean image; the cosine between "
        f"its gradient and the exact one is {fixed(f.gradient_cosine, '.2f')} (median), where 1 "
        "is the same direction."
        for name, f in known.items()
    ]
    warnings = poor_approximators(study)
    pictures, missing = [], []
    for path in sorted(study.folder.glob("*net-*.safetensors")):
        try:
            approximation = Approximation.from_bytes(files.read_checked(path))
        except ValueError as error:
            missing.append(f"{path.name} is skipped: {error}")
            continue
        pictures += _approximations(study, approximation)
    if not pictures:
        missing.append(
            "No images: there is no approximator of this teacher, or no examples.safetensors."
        )
    return Section("images", sentences, warnings, pictures, missing)


def _approximations(study: Study, approximation: Approximation) -> list[Picture]:
    hashes = {run.result.teacher.hash: run for run in study.runs if run.result.teacher}
    run = hashes.get(approximation.teacher)
    if run is None or "teacher" not in run.examples:
        return []
    embedding = run.examples["teacher"]
    size = min(approximation.cloud_size, len(embedding))
    if size < 2 or embedding.shape[1] != approximation.width:
        return []
    clouds = _clouds(embedding, size)[:CLOUDS]
    with torch.no_grad():
        exact = approximation.exact(clouds)
        approximated = approximation.network(clouds)
    vectorization = approximation.exact.vectorization
    is_image = vectorization.size == vectorization.resolution**2
    resolution = vectorization.resolution if is_image else vectorization.size
    figure = plots.persistence_images(exact.numpy(), approximated.numpy(), resolution=resolution)
    alt = f"exact persistence images of {len(clouds)} clouds above the approximated ones"
    return [Picture(figure, alt, raster=True)]


def maps(study: Study) -> Section | None:
    """Plots 2D projections of the embeddings of teacher, baseline and student by class."""
    if study.first.result.teacher is None:
        return None
    found = _embeddings(study)
    if found is None:
        return Section("maps", missing=[f"No maps: {NO_EXAMPLES}"])
    embeddings, target = found
    classes = target.tolist()
    if len(classes) < 2:
        return Section("maps", missing=["No maps: fewer than 2 images are stored."])
    pictures = []
    for name, embedding in embeddings.items():
        places, method = plots.project(embedding.numpy())
        figure = plots.scatter(places, classes, title=f"{name} ({method})")
        images = f"{len(classes)} {study.first.result.eval_split} images"
        alt = f"{method} of the embeddings of {images} by {name}"
        pictures.append(Picture(figure, alt, raster=True))
    run = next(iter(_shown(study).values()))
    weights = run.folder / "student.safetensors"
    names = checkpoint.read_about(weights).get("classes", []) if weights.exists() else []
    colors = plots.class_colors(classes)
    legend = {
        str(names[number]) if number < len(names) else f"class {number}": color
        for number, color in colors.items()
    }
    if len(set(classes)) > len(colors):
        legend["other classes"] = style.OTHERS
    return Section("maps", pictures=pictures, legend=legend)


def percent(share: float) -> str:
    """Formats a share as a percentage with three significant digits.

    Examples:
        >>> percent(0.123), percent(0.000123), percent(1.0)
        ('12.3 %', '0.0123 %', '100 %')
    """
    return f"{100 * share:.3g} %"


def count(number: int, what: str) -> str:
    """Formats a count with its noun.

    Examples:
        >>> count(1, "seed"), count(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def fixed(number: float, spec: str) -> str:
    """Formats a number with a typographic minus sign, and zero without a sign.

    Examples:
        >>> fixed(-1.25, "+.1f"), fixed(-0.001, ".2f"), fixed(0.5, "+.1f")
        ('\u22121.2', '0.00', '+0.5')
    """
    text = format(number, spec)
    if not text.strip("-+0."):
        return text.lstrip("-+")
    return text.replace("-", "\u2212")


SECTIONS = (training, gradients, shape, images, maps)
"""Functions that build the sections, in page order; a section may be None."""
