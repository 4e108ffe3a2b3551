"""``topkd study``: many runs that belong together."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from topkd.cli.options import AsJson, Out, Quiet

# The package is imported inside the commands: `topkd --help` should not have to load torch.
if TYPE_CHECKING:
    from topkd.config.study import Job, Plan
    from topkd.studies.plan import Place

PANEL = "Train"
_COMMA = re.compile(r",(?![^\[]*\])")  # not inside the brackets of a variant of a grid

study = typer.Typer(
    no_args_is_help=True,
    help="Run a study: variants of a recipe, in several settings, with many seeds.",
    rich_markup_mode="markdown",
)

File = Annotated[Path, typer.Argument(metavar="STUDY", help="A study file (YAML).")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes of the study, e.g. `seeds=0-4`, `set.optimizer.lr=0.1` for the recipe in "
        "every run, or `settings.NAME.data.limit=300`.",
    ),
]
Results = Annotated[
    list[Path] | None,
    typer.Option(help="Folder with finished results of another machine, which count as done."),
]


Only = Annotated[
    str | None,
    typer.Option("--variants", metavar="NAME,NAME", help="Only these variants, and the baseline."),
]


@study.command("run")
def run_study(
    file: File,
    changes: Changes = None,
    variants: Only = None,
    out: Out = Path("runs"),
    on: Annotated[
        str, typer.Option(metavar="NAME", help="Where jobs run: `local`, `ray` or `slurm`.")
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Jobs at a time: 1 by default, on a cluster as many as fit."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPUs per job: an equal part by default, 1 on a cluster. `threads` in a recipe "
            "takes precedence for the number of threads.",
        ),
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0.0, help="Ray: GPUs per job, e.g. 0.25; 1 by default.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Ray: a running cluster, or `auto`; `RAY_ADDRESS` by default. Without either, "
            "Ray is started on this machine.",
        ),
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="SLURM: an option of sbatch, e.g. `partition=gpu`, `gpus-per-node=1` or "
            "`time=120` (minutes); repeat it for others.",
        ),
    ] = None,
    results: Results = None,
    limit_hours: Annotated[
        float | None, typer.Option(min=0.0, help="Start no job after so many hours.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run all jobs of a study that are not done.

    Jobs that crash are tried again once and then reported; the others go on. Ctrl-C stops, and the
    same command resumes. On a cluster, `--out` must be a folder that all machines share.

    Example: `topkd study run mine.yaml --jobs 2 --out runs`
    """
    from topkd._io.progress import Progress
    from topkd.studies.executors import create
    from topkd.studies.run import run

    options = {
        "jobs": jobs,
        "threads": threads,
        "gpus": gpus,
        "address": address,
        "slurm": slurm or None,
        "until": None if limit_hours is None else time.time() + 3600 * limit_hours,
    }
    executor = create(on, options)
    outcome = run(
        _plan(file, changes, variants), out, executor, Progress(quiet=quiet), results or []
    )
    done = outcome.jobs - outcome.left
    typer.echo(f"{done} of {outcome.jobs} jobs are done")
    if outcome.not_started:
        typer.echo(
            f"{outcome.not_started} jobs were not started, because of --limit-hours; "
            "rerun the command to run them"
        )
    for ended in outcome.failed:
        typer.echo(f"failed: {ended.job.title}: {ended.error}", err=True)
    raise typer.Exit(1 if outcome.failed else 0)


@study.command()
def status(
    file: File,
    changes: Changes = None,
    variants: Only = None,
    out: Out = Path("runs"),
    results: Results = None,
    as_json: AsJson = False,
) -> None:
    """Count the jobs of a study that are done, for each setting and variant."""
    plan, place = _plan(file, changes, variants), _place(out, results)
    rows = [
        {
            "setting": setting,
            "variant": variant,
            "done": sum(place.result(job) is not None for job in jobs),
            "jobs": len(jobs),
        }
        for (setting, variant), jobs in _grouped(plan).items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(f"{row['setting']}/{row['variant']}") for row in rows)
    for row in rows:
        name = f"{row['setting']}/{row['variant']}"
        typer.echo(f"{name:<{width}}  {row['done']} of {row['jobs']}")


@study.command()
def jobs(
    file: File,
    changes: Changes = None,
    variants: Only = None,
    out: Out = Path("runs"),
    results: Results = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs of a study that are not done, for any scheduler: one command each."""
    plan = _plan(file, changes, variants)
    pending = _place(out, results).pending(plan.jobs())
    entries = [
        {
            "setting": job.setting,
            "variant": job.variant,
            "seed": job.seed,
            "command": shlex.join(
                ["topkd", "study", "job", str(file), *(changes or [])]
                + ["--setting", job.setting, "--variant", job.variant]
                + ["--seed", str(job.seed), "--out", str(out)]
            ),
        }
        for job in pending
    ]
    typer.echo(json.dumps(entries, indent=2) if as_json else _commands(entries))


@study.command("job")
def one_job(
    file: File,
    setting: Annotated[str, typer.Option(help="Name of the setting.")],
    variant: Annotated[str, typer.Option(help="Name of the variant.")],
    seed: Annotated[int, typer.Option(help="Seed of the run.")],
    changes: Changes = None,
    out: Out = Path("runs"),
) -> None:
    """Run one job of a study in this process."""
    from topkd.config.validation import near
    from topkd.studies.executors.base import work

    found = {(job.setting, job.variant, job.seed): job for job in _plan(file, changes).jobs()}
    job = found.get((setting, variant, seed))
    if job is None:
        names = [f"{each[0]}/{each[1]}" for each in found]
        raise ValueError(
            f"{file} has no job {setting}/{variant} seed {seed}"
            f"{near(f'{setting}/{variant}', list(dict.fromkeys(names)))}"
        )
    work(job, out)


@study.command()
def table(
    file: File,
    changes: Changes = None,
    variants: Only = None,
    out: Out = Path("runs"),
    results: Results = None,
    form: Annotated[
        Literal["markdown", "latex", "csv", "json"], typer.Option("--format", help="Of the table.")
    ] = "markdown",
    layout: Annotated[
        Literal["comparison", "benchmark"],
        typer.Option(help="A row per comparison, or methods x settings as in papers."),
    ] = "comparison",
) -> None:
    """Print the table of a study: every variant against the baseline, paired by seed."""
    from topkd.studies import benchmark
    from topkd.studies import table as comparison
    from topkd.studies.collect import collect
    from topkd.studies.sentences import cautions, selection

    formats = {"comparison": comparison.FORMATS, "benchmark": benchmark.FORMATS}[layout]
    found = collect(_plan(file, changes, variants), _place(out, results))
    typer.echo(formats[form](found), nl=False)
    notes = [f"{s}: {line}" for s in found.plan.settings for line in cautions(found, s)]
    for line in [selection(found.plan), *notes]:
        if line is not None:
            typer.echo(line, err=True)


@study.command()
def report(
    file: File,
    changes: Changes = None,
    variants: Only = None,
    out: Out = Path("runs"),
    results: Results = None,
    to: Annotated[
        Path | None,
        typer.Option(help="Output file. Defaults to `STUDY.html` beside the runs."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Build a self-contained HTML page: findings, forest plots, tables, figures, provenance.

    Example: `topkd study report mine.yaml --out runs --to page.html`
    """
    from topkd._io.progress import Progress
    from topkd.studies.collect import collect
    from topkd.studies.report import write_report

    plan, place = _plan(file, changes, variants), _place(out, results)
    page = to or out / f"{file.stem}.html"
    write_report(collect(plan, place), place, page, Progress(quiet=quiet))
    typer.echo(f"report: {page}")


@study.command()
def new(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe that is varied.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    methods: Annotated[
        str, typer.Option(help="Losses to compare, from `topkd list losses`.")
    ] = "kd,dkd,rkd,topkd",
    seeds: Annotated[str, typer.Option(help="Seeds of every variant: `0-2` or `0,1,2`.")] = "0-2",
) -> None:
    """Write a study that compares methods on a recipe.

    Example: `topkd study new digits mine.yaml --methods kd,dkd,rkd,topkd --seeds 0-2`
    """
    from topkd._io import files
    from topkd.studies.new import template

    if file.exists():
        raise FileExistsError(f"{file} exists already; choose another name")
    files.write(file, template(recipe, methods.split(","), seeds))
    typer.echo(f"{file}: edit it, then `topkd study run {file}`")


def _plan(file: Path, changes: list[str] | None, variants: str | None = None) -> Plan:
    from topkd.config import study as studies

    plan = studies.load(file, tuple(changes or ()))
    return plan if variants is None else plan.only(_COMMA.split(variants))


def _place(out: Path, results: list[Path] | None) -> Place:
    from topkd.studies.plan import Place

    return Place(out, tuple(results or ()))


def _grouped(plan: Plan) -> dict[tuple[str, str], list[Job]]:
    grouped: dict[tuple[str, str], list[Job]] = {}
    for job in plan.jobs():
        grouped.setdefault((job.setting, job.variant), []).append(job)
    return grouped


def _commands(entries: list[dict[str, object]]) -> str:
    return "\n".join(str(entry["command"]) for entry in entries) or "every job is done"
