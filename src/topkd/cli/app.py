"""The program: all commands, and how errors and interruptions end it."""

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

INTERRUPTED = 130  # exit status of a program that was stopped by Ctrl-C

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
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Knowledge distillation for PyTorch with topological losses.

    Start with `topkd run digits`: it needs no data and takes a few minutes.
    Then `topkd list recipes`, `topkd copy RECIPE my.yaml`, `topkd run my.yaml`.
    """


for _found in pkgutil.iter_modules(commands.__path__):
    _name = _found.name.rstrip("_")  # of words that Python or its library has too
    _module = importlib.import_module(f"{commands.__name__}.{_found.name}")
    _command = getattr(_module, _found.name)
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name, rich_help_panel=_module.PANEL)
    else:
        app.command(_name, rich_help_panel=_module.PANEL)(_command)


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
        from topkd._runtime import processes

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


def _join_seeds(arguments: Sequence[str]) -> list[str]:
    """Lets `--seeds 0 1 2` stand for `--seeds 0,1,2`, which is all that the parser knows."""
    joined: list[str] = []
    for argument in arguments:
        if argument.isdigit() and len(joined) > 1 and joined[-2] == "--seeds":
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined
