"""The command line: parsing and printing only, every command is one call into the package."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from topkd.allocator import keep_freed_memory
from topkd.printing import catalogue, print_files, print_findings, print_results

# The package is imported inside the commands: `topkd --help` should not have to load torch.
if TYPE_CHECKING:
    from topkd.experiment import Experiment

MOST_SEEDS = 10_000
INTERRUPTED = 130  # exit status of a program that was stopped by Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A file, or a name from `topkd list recipes`.")
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the recipe, e.g. `optimizer.lr=0.1` or `losses.kd.weight=1`.",
    ),
]
Seeds = Annotated[str, typer.Option(help="One run for each seed: `0 1 2`, `0,1,2` or `0-2`.")]
Out = Annotated[Path, typer.Option(help="Where runs are kept, in a folder called as the recipe.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Endpoint = Annotated[str | None, typer.Option(help="Address of the hub, if it is another one.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Let the file name code to run and paths to open."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@app.callback()
def _app() -> None:
    """Make a small network out of a large one, and keep the shape of what the large one knows.

    Begin with `topkd run digits`: it needs no data and takes a few minutes.
    Then `topkd list recipes`, `topkd copy RECIPE my.yaml`, `topkd run my.yaml`.
    """


@app.command()
def run(
    recipe: RecipeName,
    changes: Changes = None,
    seeds: Seeds = "0",
    out: Out = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Run all that a recipe needs: teacher, RipsNet, students, evaluation, report.

    What is done already is not done again, so the same command goes on where it was stopped.

    Examples: `topkd run digits --seeds 0 1 2` · `topkd run cifar100/resnet56-resnet20
    data.root=~/data/cifar100`
    """
    from topkd.report import write_report

    experiment = _experiment(recipe, changes, out, quiet)
    results = [
        experiment.student(arm, seed) for seed in _numbers(seeds) for arm in experiment.recipe.arms
    ]
    if not _is_first_process():
        return
    page = experiment.folder / "report.html"
    write_report(experiment.folder, page, experiment.progress)
    print_results(results)
    typer.echo(f"report: {page}")


@app.command()
def teacher(
    recipe: RecipeName, changes: Changes = None, out: Out = Path("runs"), quiet: Quiet = False
) -> None:
    """Train the teacher of a recipe, and nothing else."""
    experiment = _experiment(recipe, changes, out, quiet)
    section = experiment.recipe.teacher
    if section is not None and section.pretrained:
        typer.echo(f"teacher: {section.model}, with its published weights; nothing to train")
        return
    if experiment.teacher is None:
        raise ValueError(f"{experiment.recipe.name} has no teacher; `topkd run` trains its network")
    typer.echo(f"teacher: {experiment.teacher_file}")


@app.command()
def ripsnet(
    recipe: RecipeName, changes: Changes = None, out: Out = Path("runs"), quiet: Quiet = False
) -> None:
    """Make clouds and persistence images and train RipsNet, and before it the teacher.

    The same for a DistanceNet, where a loss is computed `via: distancenet`, and for the paraphraser
    of factor transfer.
    """
    experiment = _experiment(recipe, changes, out, quiet)
    experiment.prepare()
    made = sorted(experiment.folder.glob("*-*.safetensors"))
    if not made:
        raise ValueError(
            f"no loss of {experiment.recipe.name} is computed `via: ripsnet` or "
            "`via: distancenet`, or learns from its teacher first in another way"
        )
    for path in made:
        typer.echo(f"learnt from the teacher: {path}")


@app.command()
def student(
    recipe: RecipeName,
    changes: Changes = None,
    arm: Annotated[
        str, typer.Option(help="`student` for the recipe's own losses, or the name of a control.")
    ] = "student",
    seeds: Seeds = "0",
    out: Out = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Train and evaluate the student of a recipe without its controls, or one control."""
    experiment = _experiment(recipe, changes, out, quiet)
    results = [experiment.student(arm, seed) for seed in _numbers(seeds)]
    if _is_first_process():
        print_results(results)


@app.command()
def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or a weights file.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Network in the file, if the file does not tell.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|KEY=VALUE",
            help="Evaluation data set, or a change to the one in the file, e.g. `root=FOLDER`.",
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(help="The same as `--data root=FOLDER`.")] = None,
    weights: Annotated[
        Literal["plain", "ema"],
        typer.Option(help="Of a file with both: as trained, or their running mean."),
    ] = "plain",
    head: Annotated[
        str | None,
        typer.Option(help="Module that makes the logits, of a network where it is not found."),
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure accuracy and calibration of a network on test images, in float32.

    Example: `topkd evaluate resnet20.pth --model resnet20 --data cifar100 --root ~/data/cifar100`
    """
    from topkd.experiment import evaluate_file
    from topkd.progress import Progress

    changes = [*(data or []), *([f"root={json.dumps(root)}"] if root else [])]
    progress = Progress(quiet=quiet)
    result = evaluate_file(
        target, model, changes, progress, weights=weights, head=head, trust=trust
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(f"{result['model']} on the {result['images']:,} test images of {result['data']}")
    typer.echo(f"top-1              {result['top1']:.2f} %")
    typer.echo(f"top-5              {result['top5']:.2f} %")
    typer.echo(f"log-likelihood     {-result['nll']:.4f} nats an image")
    typer.echo(f"calibration error  {result['ece']:.2f} %")


@app.command()
def export(
    target: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or weights that topkd wrote.")
    ],
    to: Annotated[
        list[str],
        typer.Option(help="`safetensors`, `onnx`, `torch-export`, `onnx-int8`, or several: `a,b`."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Changes to the run's data, e.g. `root=FOLDER`."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels on a side, to check on random images if there are none."),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Of the weights, for the model card.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Check on so many test images instead of all.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a logit, but for eight bits.")
    ] = 1e-4,
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a student for others to use, with a model card, and check every file.

    Example: `topkd export runs/digits/student/seed0 --to safetensors,onnx,onnx-int8 --out mine`
    """
    from topkd.export import export as export_student
    from topkd.progress import Progress

    formats = [name.strip() for part in to for name in part.split(",")]
    config = export_student(
        target,
        formats,
        out,
        Progress(quiet=quiet),
        data=data or [],
        size=size,
        license=license_,
        limit=images,
        tolerance=tolerance,
        trust=trust,
    )
    if as_json:
        typer.echo(json.dumps(config, indent=2))
        return
    print_files(config)
    typer.echo(f"export: {out}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `topkd export` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to.")],
    endpoint: Endpoint = None,
    private: Annotated[
        bool, typer.Option("--private", help="Let nobody else see the repository.")
    ] = False,
) -> None:
    """Push an export to the Hugging Face hub, with a hash of every file."""
    from topkd import hub

    typer.echo(f"commit: {hub.push(folder, repository, endpoint=endpoint, private=private)}")


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where from.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write to.")],
    endpoint: Endpoint = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit, if not the newest.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fetch an export from the Hugging Face hub and check the hash of every file."""
    from topkd import hub
    from topkd.progress import Progress

    paths = hub.pull(
        repository, folder, Progress(quiet=quiet), endpoint=endpoint, revision=revision
    )
    typer.echo(f"{folder}: {len(paths)} files, all as they were pushed")


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="A folder with finished runs.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write; `report.html` among the runs if not told."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown, and write no page.")
    ] = False,
) -> None:
    """Make one HTML page, with all pictures in it, of finished runs."""
    from topkd import report as reports
    from topkd.progress import Progress

    if markdown:
        typer.echo(reports.markdown(runs))
        return
    page = out or runs / "report.html"
    reports.write_report(runs, page, Progress())
    typer.echo(f"report: {page}")


@app.command("list")
def list_(
    what: Annotated[
        Literal["recipes", "models", "losses", "data"], typer.Argument(help="Which catalogue.")
    ],
    as_json: AsJson = False,
) -> None:
    """List what recipes can name."""
    entries = catalogue(what)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    width, group = max(len(entry["name"]) for entry in entries), ""
    for entry in entries:
        if entry.get("group", "") != group:
            group = entry["group"]
            typer.echo(f"{group}/")
        indent = "  " if group else ""
        typer.echo(f"{indent}{entry['name']:<{width}}  {entry['about']}".rstrip())
    if what == "models":
        typer.echo("and torchvision:NAME, timm:NAME, or MODULE:CALLABLE for one of your own")


@app.command()
def show(recipe: RecipeName, changes: Changes = None) -> None:
    """Print a recipe with every setting that it leaves to its default."""
    from topkd import recipe as recipes

    typer.echo(recipes.write(recipes.load(recipe, changes or [])), nl=False)


@app.command()
def copy(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
) -> None:
    """Copy a recipe, comments included, to a file of your own."""
    from topkd import files
    from topkd import recipe as recipes

    if file.exists():
        raise FileExistsError(f"{file} exists already; copy to another name")
    files.write(file, recipes.text(recipe))
    typer.echo(f"{file}: edit it, then `topkd check {file}` and `topkd run {file}`")


@app.command()
def check(recipe: RecipeName, changes: Changes = None) -> None:
    """Check every name and option of a recipe, without running it."""
    from topkd import recipe as recipes
    from topkd.checks import check as check_recipe
    from topkd.checks import check_batches, found_taps

    loaded = recipes.load(recipe, changes or [])
    check_recipe(loaded)
    check_batches(loaded)
    taught = f", taught by {loaded.teacher.model}" if loaded.teacher else ""
    arms = ", ".join(loaded.arms)
    typer.echo(f"{loaded.name} is right: {loaded.student.model}{taught}; runs {arms}")
    for line in found_taps(loaded):
        typer.echo(line)


@app.command()
def doctor(
    recipe: RecipeName,
    changes: Changes = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Try a recipe for a minute, and tell what to change before hours are spent on it.

    Does the teacher reach its recorded accuracy on these images? Are they normalised and
    cropped as it knows them, and its classes in the same order? Do the taps give every loss what it
    needs, and is a term too light to matter? How good is an approximator? How long does an epoch
    take here, in how much memory?

    `good` is as it should be, `look` deserves a thought, `wrong` spoils the runs; if anything is
    wrong, the exit status is 1. Nothing is written. `topkd check` looks at the words of a recipe
    alone, and needs no data.

    Example: `topkd doctor cifar100/resnet20-resnet8 data.root=~/data/cifar100
    teacher.checkpoint=resnet20.pth`
    """
    from dataclasses import asdict

    from topkd.doctor import examine

    findings = [asdict(finding) for finding in examine(_experiment(recipe, changes, out, quiet))]
    wrong = sum(finding["verdict"] == "wrong" for finding in findings)
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        print_findings(findings)
        typer.echo(f"{wrong} wrong: to be changed first" if wrong else "nothing is wrong")
    raise typer.Exit(1 if wrong else 0)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print machine, versions and what is chosen for this machine, for reports of faults."""
    from topkd.device import choices
    from topkd.environment import environment

    described = environment() | choices()
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    for name, value in described.items():
        typer.echo(f"{name:<15} {value}")


def main() -> None:
    """Runs the command line; exits with 2 and one line for what a user can cause."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as Python does it for standard error
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    threading.excepthook = _end_of_thread
    keep_freed_memory()
    try:
        app(_join_seeds(sys.argv[1:]), prog_name="topkd")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("\ntopkd: stopped; the same command goes on from the last epoch", file=sys.stderr)
        raise
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except (ValueError, ImportError) as error:  # what a user can cause; anything else is a bug
        _fail(str(error))
    except RuntimeError as error:
        from topkd import processes

        if not processes.lost(error):
            raise
        _fail("another process has ended; the same command resumes from the last epoch", status=1)


def _fail(message: str, *, status: int = 2) -> NoReturn:
    """Ends the program with a line; of several processes, all but the first give their number."""
    rank = os.environ.get("RANK", "0")
    print(f"topkd{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr)
    sys.exit(status)


def _end_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Prints what ended a thread, but for a file that TensorBoard's cannot write.

    The next call of the writer raises that again, and the main thread tells it in a line.
    """
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _terminate(number: int, frame: object) -> NoReturn:
    print("topkd: terminated; the same command resumes from the last epoch", file=sys.stderr)
    sys.exit(128 + number)


def _experiment(recipe: str, changes: list[str] | None, out: Path, quiet: bool) -> Experiment:
    from topkd import recipe as recipes
    from topkd.experiment import Experiment
    from topkd.progress import Progress

    return Experiment(recipes.load(recipe, changes or []), out, Progress(quiet=quiet))


def _is_first_process() -> bool:
    """Tells whether this is the one of several processes that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _join_seeds(arguments: Sequence[str]) -> list[str]:
    """Lets `--seeds 0 1 2` stand for `--seeds 0,1,2`, which is all that the parser knows."""
    joined: list[str] = []
    for argument in arguments:
        if argument.isdigit() and len(joined) > 1 and joined[-2] == "--seeds":
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined


def _numbers(seeds: str) -> list[int]:
    """Reads `0,1,2` or `0-2`."""
    ranges: list[range] = []
    try:
        for part in seeds.split(","):
            first, _, last = part.partition("-")
            ranges.append(range(int(first), int(last or first) + 1))
    except ValueError:
        raise ValueError(f"--seeds: expected numbers such as 0,1,2 or 0-2, got {seeds!r}") from None
    if sum(max(0, each.stop - each.start) for each in ranges) > MOST_SEEDS:
        raise ValueError(f"--seeds: expected at most {MOST_SEEDS:,} numbers, got {seeds!r}")
    numbers = [number for each in ranges for number in each]
    if not numbers:
        raise ValueError(f"--seeds: {seeds!r} is empty; give the smaller number first")
    return numbers
