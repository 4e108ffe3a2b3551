"""The command line application: commands, error handling and signals."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

import topkd
from topkd._runtime.allocator import keep_freed_memory
from topkd.cli import commands

INTERRUPTED = 130  # exit status after Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"topkd {topkd.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[  # noqa: ARG001  (its callback prints it)
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Knowledge distillation for PyTorch with topological losses.

    Start with `topkd run digits`, which needs no data set and takes a few minutes.
    Then `topkd list recipes`, `topkd copy RECIPE my.yaml`, `topkd run my.yaml`.
    """


for _found in pkgutil.iter_modules(commands.__path__):
    _name = _found.name.rstrip("_")  # commands named like Python builtins
    _module = importlib.import_module(f"{commands.__name__}.{_found.name}")
    app.command(_name, rich_help_panel=_module.PANEL)(getattr(_module, _found.name))


def main() -> None:
    """Runs the command line. User errors print one line and exit with status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as Python does for standard error
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    threading.excepthook = _end_of_thread
    keep_freed_memory()
    try:
        app(_join_seeds(sys.argv[1:]), prog_name="topkd")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(
                "\ntopkd: stopped; rerun the command to resume from the last epoch", file=sys.stderr
            )
        raise
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except (ValueError, ImportError) as error:  # user errors; anything else is a bug
        _fail(str(error))
    except RuntimeError as error:
        from topkd._runtime import processes

        if not processes.lost(error):
            raise
        _fail(
            "another process has exited; rerun the command to resume from the last epoch", status=1
        )


def _fail(message: str, *, status: int = 2) -> NoReturn:
    """Prints a message and exits. Processes other than the first include their rank."""
    rank = os.environ.get("RANK", "0")
    print(f"topkd{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr)
    sys.exit(status)


def _end_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Prints the exception of a thread, except an OSError of TensorBoard's writer thread.

    The next call of the writer raises it again in the main thread, which reports it.
    """
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _terminate(number: int, frame: object) -> NoReturn:
    print("topkd: terminated; rerun the command to resume from the last epoch", file=sys.stderr)
    sys.exit(128 + number)


def _join_seeds(arguments: Sequence[str]) -> list[str]:
    """Converts `--seeds 0 1 2` to `--seeds 0,1,2`, the form that the parser accepts."""
    joined: list[str] = []
    for argument in arguments:
        if argument.isdigit() and len(joined) > 1 and joined[-2] == "--seeds":
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined
