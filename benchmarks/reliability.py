"""Kills runs, damages their files, mutates recipes and opens hostile files; counts what goes wrong.

python benchmarks/reliability.py [--kills 200] [--recipes 2000] [--changes 1000] [--page FILE]

Kills, damage and hostile files run the command line in a separate process, forked after the
imports. Recipes and changes are parsed and checked in this process.

* Kills: one command is killed at random times and repeated until it ends. A loss is a run whose
  files differ in any bit from those of a run that was never killed.
* Damage: each file of a finished run is truncated, emptied or deleted, or has one bit flipped;
  then every command that reads the run is executed. Damage is noticed if a command names the file,
  repaired if the file is written again with the same bytes, without effect if no output differs,
  and unnoticed otherwise.
* Recipes and changes: an error is reported as one line for each fault, without a traceback.
* Hostile files: no code or command in them is executed, and each is rejected in bounded time and
  memory.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import torch
import yaml
from rich.progress import track

from topkd.cli import app
from topkd.config import recipe
from topkd.config.validation import RecipeError
from topkd.models import MODELS, checkpoint
from topkd.reporting import page as _page  # noqa: F401  (imported before the fork, like all here)
from topkd.training.check import check
from topkd.training.experiment import Experiment  # noqa: F401

LIMIT = 60.0  # seconds that a command on a hostile file may take
MEMORY = 2.0  # GB
TEACHER = {
    "data": {"name": "digits", "limit": 200},
    "student": {"model": "resnet8x0.25"},
    "losses": [{"name": "ce"}],
    "epochs": 2,
    "batch_size": 32,
    "threads": 1,
}
TOPKD = {"name": "topkd", "weight": 5.0, "via": "ripsnet", "training": {"passes": 2, "epochs": 4}}
RECIPE = TEACHER | {
    "name": "tiny",
    "teacher": {"model": "resnet8x0.25", "recipe": "taught.yaml", "cache": True},
    "losses": [{"name": "ce"}, {"name": "kd", "weight": 2.0}, TOPKD, {"name": "crd"}],
    "epochs": 3,
}
TRAIN = ("student", "tiny.yaml", "--quiet")
RUN = Path("runs/tiny/kd+topkd+crd/seed0")
# Commands that read a finished run; the last trains another student with what the first left.
READERS = (
    TRAIN,
    ("report", "runs/tiny", "--markdown"),
    ("evaluate", str(RUN), "--json", "--quiet"),
    ("student", "tiny.yaml", "--quiet", "--seeds", "1"),
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int  # negative for a signal
    output: str
    error: str
    seconds: float
    gigabytes: float

    @property
    def traceback(self) -> bool:
        """Whether it ended in an error that no user should see."""
        return "Traceback" in self.error


def run(arguments: tuple[str, ...], folder: Path, kill_after: float | None = None) -> Outcome:
    """Runs a command in a folder, in a process of its own, and kills it where that is wanted."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as error:
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(arguments, folder, output.fileno(), error.fileno())
        limit = 10 * LIMIT if kill_after is None else kill_after
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            if time.monotonic() - start > limit:
                os.kill(child, signal.SIGKILL)
                ended = os.wait4(child, 0)
                break
            time.sleep(0.002)
        texts = []
        for file in (output, error):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        _, status, usage = ended
        seconds = time.monotonic() - start
        return Outcome(os.waitstatus_to_exitcode(status), *texts, seconds, usage.ru_maxrss / 2**20)


def _become(arguments: tuple[str, ...], folder: Path, output: int, error: int) -> None:
    status = 70
    try:
        os.dup2(output, 1)
        os.dup2(error, 2)
        os.chdir(folder)
        sys.argv = ["topkd", *arguments]
        sys.path.insert(0, str(folder))  # so that code that a file names would be found
        app.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def prepare(folder: Path) -> Path:
    """Writes the recipes into a new folder."""
    folder.mkdir(parents=True)
    (folder / "taught.yaml").write_text(yaml.safe_dump(TEACHER), encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Hashes the weights and numbers of every run in a folder."""
    kept = ("*.safetensors", "metrics.jsonl")
    found = {path for pattern in kept for path in folder.glob(f"runs/**/{pattern}")}
    without_times = {
        path: "\n".join(
            ",".join(part for part in line.split(",") if "seconds" not in part)
            for line in path.read_text(encoding="utf-8").splitlines()
        ).encode()
        if path.suffix == ".jsonl"
        else path.read_bytes()
        for path in found
    }
    return {
        str(path.relative_to(folder)): hashlib.sha256(content).hexdigest()
        for path, content in without_times.items()
    }


def kills(work: Path, count: int, draw: random.Random) -> Counter[str]:
    """Kills a command at random times, repeats it, and compares what is there in the end."""
    whole = prepare(work / "whole")
    done = run(TRAIN, whole)
    assert done.status == 0, done.error
    expected, found, usual = digests(whole), Counter[str](), done.seconds
    for trial in track(range(4 * count), "kills"):
        if not found["kills"] < count:
            break
        folder = prepare(work / f"killed-{trial}")
        while (ended := run(TRAIN, folder, draw.uniform(0, usual))).status < 0:
            found["kills"] += 1
        usual = min(usual, max(ended.seconds, usual / 2))  # other work slowed the first run
        found["runs"] += 1
        found["tracebacks"] += ended.traceback
        found["losses"] += ended.status != 0 or digests(folder) != expected
        found["leftovers"] += len(list(folder.rglob("*.tmp")))
        shutil.rmtree(folder)
    return found


def damages(content: bytes, draw: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Gives what may become of a file: None is no file."""
    if content:
        place = draw.randrange(len(content))
        flipped = bytes([content[place] ^ (1 << draw.randrange(8))])
        yield "flipped", content[:place] + flipped + content[place + 1 :]
        yield "cut off", content[: draw.randrange(len(content))]
        yield "emptied", b""
    yield "deleted", None


def damage(work: Path, draw: random.Random) -> Counter[str]:
    """Damages each file of a finished run, and lets every command read it."""
    whole = prepare(work / "damaged")
    assert run(TRAIN, whole).status == 0
    known = read_by_all(whole, work / "known")
    paths = [path for path in sorted(whole.glob("runs/**/*")) if path.is_file()]
    found = Counter[str](files=len(paths))
    for path in track(paths, "damage"):
        content, name = path.read_bytes(), path.relative_to(whole)
        for kind, damaged in damages(content, draw):
            found["damages"] += 1
            copy = work / "copy"
            shutil.copytree(whole, copy)
            _put(copy / name, damaged)
            found[_verdict(copy, name, content, known, kind)] += 1
            shutil.rmtree(copy)
    return found


def _put(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def read_by_all(whole: Path, work: Path) -> list[tuple[str, dict[str, str]]]:
    """What each reader prints and leaves where nothing is damaged."""
    shutil.copytree(whole, work)
    found = []
    for reader in READERS:
        done = run(reader, work)
        assert done.status == 0, done.error
        found.append((done.output, digests(work)))
    shutil.rmtree(work)
    return found


def _verdict(
    folder: Path,
    name: Path,
    content: bytes,
    known: list[tuple[str, dict[str, str]]],
    kind: str,
) -> str:
    for reader, (output, left) in zip(READERS, known, strict=True):
        done = run(reader, folder)
        if done.traceback:
            return _report_of("tracebacks", name, kind, reader, done.error)
        if done.status != 0:
            if name.name in done.error or name.parent.name in done.error:
                return "noticed"
            return _report_of("not named", name, kind, reader, done.error)
        found, own = digests(folder), str(name)
        differ = [path for path in found.keys() | left if found.get(path) != left.get(path)]
        if done.output != output or set(differ) - {own}:
            return _report_of("unnoticed", name, kind, reader, done.output)
    path = folder / name
    same = path.is_file() and path.read_bytes() == content
    return "repaired" if same else "without effect"


def _report_of(verdict: str, *facts: object) -> str:
    print(verdict, *facts, sep=" | ", file=sys.stderr)
    return verdict


# --- recipes -------------------------------------------------------------------------------------

WORDS = (
    "",
    "null",
    "-1",
    "1e308",
    ".nan",
    "[]",
    "{}",
    "[[[",
    "&a [*a]",
    "!!int x",
    "<<",
    "\0",
    "²",
)


def mutated(text: str, draw: random.Random) -> str:
    """Changes a recipe in one to three places: characters, lines or values."""
    for _ in range(draw.randint(1, 3)):
        lines = text.splitlines(keepends=True) or ["\n"]
        place, kind = draw.randrange(len(lines)), draw.randrange(5)
        key, colon, _ = lines[place].partition(":")
        if kind == 0:
            lines[place] = f"{key}{colon} {draw.choice(WORDS)}\n"
        elif kind == 1:
            del lines[place]
        elif kind == 2:
            lines.insert(place, draw.choice(lines))
        elif kind == 3:
            at = draw.randrange(len(lines[place]))
            character = chr(draw.choice((draw.randrange(32, 127), draw.randrange(0x2FFF))))
            lines[place] = lines[place][:at] + character + lines[place][at + 1 :]
        else:
            lines[place] = " " * draw.randrange(4) + lines[place]
        text = "".join(lines)
    return text


def recipes(count: int, draw: random.Random) -> Counter[str]:
    """Reads and checks mutated recipes."""
    names = recipe.names()
    texts = [recipe.text(name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.yaml"

        def trial() -> None:
            path.write_text(mutated(draw.choice(texts), draw), encoding="utf-8")
            check(recipe.load(str(path)))

        return _tried(trial, count, "recipes")


def changes(count: int, draw: random.Random) -> Counter[str]:
    """Applies random changes to recipes, and checks what they give."""
    names = recipe.names()
    keys = [
        "losses.kd.weight",
        "losses.²",
        "epochs",
        "optimizer.lr",
        "data.root",
        "teacher",
        "name",
    ]
    keys += [
        "data.name",
        "student.model",
        "losses",
        "losses.0",
        "controls.x",
        "x.y.z",
        "[",
        "..",
        "",
    ]
    values = [
        *WORDS,
        "0",
        "1",
        "99999999",
        "true",
        "a" * 3000,
        "../x",
        "1:30",
        "2024-01-01",
        "[1, 2]",
    ]

    def trial() -> None:
        check(recipe.load(draw.choice(names), [f"{draw.choice(keys)}={draw.choice(values)}"]))

    return _tried(trial, count, "changes")


def _tried(trial: Callable[[], None], count: int, title: str) -> Counter[str]:
    found = Counter[str](tried=count)
    for _ in track(range(count), title):
        start = time.monotonic()
        try:
            trial()
            found["valid"] += 1
        except (RecipeError, ValueError, ImportError, OSError):  # what the command line prints
            found["refused"] += 1
        except Exception:
            traceback.print_exc()
            found["tracebacks"] += 1
        found["slow"] += time.monotonic() - start > LIMIT
    return found


# --- hostile files -------------------------------------------------------------------------------


class Runs:
    """A pickle of this runs a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def zip_bomb(path: Path) -> None:
    """Rewrites a checkpoint so that one tensor is a gigabyte of zeros, deflated."""
    whole = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            if not name.endswith("data/0"):
                bomb.writestr(name, source.read(name))
                continue
            with bomb.open(name, "w", force_zip64=True) as member:
                for _ in range(1024):
                    member.write(bytes(2**20))


def hostile(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Writes files that ask for what they must not have, each with the command that reads it."""
    network = MODELS["resnet8x0.25"].build(10).network
    about = {"model": "resnet8x0.25", "classes": list("0123456789"), "size": 8}
    about |= {"mean": [0.5] * 3, "std": [0.5] * 3, "data": {"name": "digits"}}
    shards = {"name": "webdataset", "test": "x.tar", "cache": "ran"}
    asked = {
        "command in root": {"data": shards | {"root": "pipe:touch ran #", "train": "x.tar"}},
        "command in braces": {"data": shards | {"train": "{p,p}ipe:touch ran"}},
        "command": {"data": shards | {"train": "pipe:touch ran"}},
        "quotes in address": {"data": shards | {"train": "http://127.0.0.1/';touch ran;'"}},
        "cache": {"data": {"name": "webdataset", "root": ".", "cache": "ran"}},
        "root": {"data": {"name": "folder", "root": "/"}},
        "code as data": {"data": {"name": "dataset", "train": "code:f", "test": "code:f"}},
        "code as network": {"model": "code:f"},
        "huge images": {"size": 10**12},
        "list as data": {"data": [1]},
        "no classes": {"classes": None},
    }
    (folder / "code.py").write_text("open('ran', 'w').close()", encoding="utf-8")
    for name, change in asked.items():
        path = folder / f"{name}.safetensors"
        checkpoint.save_weights(path, network, about | change)
        yield f"metadata: {name}", ("evaluate", str(path))
        yield f"metadata: {name}", ("export", str(path), "--to", "safetensors", "--out", "out")
    reader = ("--model", "resnet8x0.25", "--data", "digits")
    contents = {"pickle.pth": pickle.dumps(Runs()), "empty.pth": b"", "text.pth": b"weights"}
    whole = io.BytesIO()
    torch.save({"state_dict": {"weight": Runs()}}, whole)
    contents |= {"archive.pth": whole.getvalue(), "half.pth": whole.getvalue()[:99]}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield f"weights: {name}", ("evaluate", str(folder / name), *reader)
    zip_bomb(folder / "bomb.pth")
    yield "weights: zip bomb", ("evaluate", str(folder / "bomb.pth"), *reader)
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))
    yamls = {
        "aliases": f"a0: &a0 [x, x, x, x, x, x, x, x, x]\n{levels}",
        "nesting": "a: " + "[" * 3000,
        "epochs": yaml.safe_dump(TEACHER | {"epochs": 9999999}),
        "leaves --out": yaml.safe_dump(TEACHER | {"name": "../../ran"}),
        "absolute name": yaml.safe_dump(TEACHER | {"name": "/ran"}),
        "code in YAML": "a: !!python/object/apply:os.system ['touch ran']",
    }
    for name, text in yamls.items():
        path = folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        yield f"recipe: {name}", ("check", str(path))


def open_hostile(work: Path) -> Counter[str]:
    """Opens each hostile file with the command that reads it."""
    work.mkdir()
    found = Counter[str]()
    for name, command in track(list(hostile(work)), "hostile files"):
        done = run(command, work)
        found["tried"] += 1
        found["executions"] += (work / "ran").exists() or (work / "out").exists()
        found["tracebacks"] += done.traceback
        found["refused"] += done.status == 2
        found["valid"] += done.status == 0
        found["too slow or large"] += done.seconds > LIMIT or done.gigabytes > MEMORY
        if done.status != 2 or done.traceback:
            print(name, command, done.status, done.error, sep=" | ", file=sys.stderr)
        shutil.rmtree(work / "out", ignore_errors=True)
    return found


# --- the page ------------------------------------------------------------------------------------

PAGE = """# Reliability

`{command}` prints these figures, which are counted, not estimated.

| what | figures |
|---|---|
{rows}

{about}
"""


def table(found: dict[str, Counter[str]]) -> str:
    """Writes one row for each part of the campaign."""
    return "\n".join(
        f"| {part} | {', '.join(f'{count:,} {what}' for what, count in counts.items())} |"
        for part, counts in found.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at least so many")
    parser.add_argument("--recipes", type=int, default=2000)
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default="kills,damage,recipes,changes,hostile files")
    parser.add_argument("--page", type=Path, help="where the page is written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parts: dict[str, Callable[[random.Random], Counter[str]]] = {
            "kills": lambda draw: kills(work, asked.kills, draw),
            "damage": lambda draw: damage(work, draw),
            "recipes": lambda draw: recipes(asked.recipes, draw),
            "changes": lambda draw: changes(asked.changes, draw),
            "hostile files": lambda draw: open_hostile(work / "hostile"),
        }
        for part in asked.parts.split(","):
            found[part] = parts[part](random.Random(asked.seed))
            print(part, dict(found[part]), flush=True)
    wrong = ("losses", "unnoticed", "not named", "tracebacks", "executions", "too slow or large")
    print({name: sum(counts[name] for counts in found.values()) for name in wrong})
    if asked.page:
        text = __doc__.split("\n\n", 2)[2].strip()
        words = shlex.join(["python", "benchmarks/reliability.py", *_without_page(sys.argv[1:])])
        page = PAGE.format(command=words, rows=table(found), about=text)
        asked.page.write_text(page, encoding="utf-8")


def _without_page(words: list[str]) -> list[str]:
    if "--page" not in words:
        return words
    place = words.index("--page")
    return words[:place] + words[place + 2 :]


if __name__ == "__main__":
    main()
