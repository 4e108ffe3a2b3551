"""Makes the page of losses from the catalog, the docstrings and the recipes.

python docs/losses.py > docs/losses.md
"""

import importlib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from textwrap import dedent
from typing import Any, Literal

from topkd.config import recipe
from topkd.losses import LOSSES, Loss
from topkd.losses.controls import Edges, Target, Topological

GROUPS = {
    "Labels and logits": "ce kd dkd nkd dist ttm wttm ctkd mlkd deit",
    "Feature maps and embeddings": "fitnet mse at nst vid fsp ab ofd ft review",
    "Relations and memory": "sp cc rkd pkt crd",
    "The teacher's classifier": "srrl cat simkd",
    "Topology": "topkd wasserstein pce edge_matching rtd_lite ultrametric scale",
}
# Of the pair that most papers share, and of the loss that needs another network.
SHOWN = ("methods/resnet56-resnet20/", "imagenet/regnety16-deit-tiny")
ESCAPES = {  # Markdown takes away a backslash that stands before punctuation, in formulas too
    r"\,": r"\thinspace ",
    r"\;": r"\enspace ",
    r"\!": r"\negthinspace ",
    r"\|": r"\Vert ",
    r"\{": r"\lbrace ",
    r"\}": r"\rbrace ",
    r"\\": r"\cr ",
}
INTRODUCTION = """# Losses

Made by `python docs/losses.py` from the source: every entry is what the docstring of the loss says.
`topkd list losses` prints the list. A recipe names a loss and gives it options and a weight
([recipes](recipes.md#losses) tells what every term can have):

```yaml
losses:
  - {name: ce}
  - {name: at, weight: 1000.0, skip: 1}
```

In formulas s is the student and t the teacher; n images form a batch; z are logits, p predictions,
F feature maps or all that a network made of an image, e or f embeddings; c counts classes or
channels, and d the numbers of each image. *Cost* is how the work for a batch grows, and what a loss
brings along. Where an option has no default, the text says what happens.

Under each loss stand the lines of a recipe that uses it, with published weights where there are
some; the comment on top of the recipe says whose. They are for `resnet56` and `resnet20`, 240
epochs on a GPU. The same names under `methods/resnet20-resnet8/` take 20 epochs and suit a CPU.
"""
CONTROLS = """### Controls

A loss on shape can be its own control, so that one sees what of it matters. The
[docstring of `topkd.losses.controls`](../src/topkd/losses/controls.py) tells how each is drawn.
"""
QUESTIONS = {
    "edges: random": "Is it the critical edges, or would any others do? One tree, drawn at random "
    "for every batch, stands in for all spanning trees",
    "target: permuted": "Does it matter which image is which? Each image gets the teacher's answer "
    "to another of its batch",
    "target: other": "Does it matter which batch it is? The batch gets the teacher's answers to "
    "the one before",
    "target: mean": "Do the teacher's batches differ at all? Each gets the mean of what describes "
    "them",
}


def page() -> str:
    """Writes the whole page.

    Raises:
        ValueError: If the groups and the catalog differ.
    """
    grouped = [name for names in GROUPS.values() for name in names.split()]
    if sorted(grouped) != sorted(LOSSES):
        odd = sorted(set(grouped) ^ set(LOSSES))
        raise ValueError(f"GROUPS and LOSSES differ in {', '.join(odd) or 'a name that is twice'}")
    parts = [INTRODUCTION, "\n".join(contents())]
    for group, names in GROUPS.items():
        parts.append(f"## {group}")
        parts += [entry(name) for name in names.split()]
        if group == "Topology":
            parts.append("\n".join(controls()))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def contents() -> Iterator[str]:
    """Lists all losses, a table for each group."""
    for group, names in GROUPS.items():
        yield f"\n**[{group}](#{anchor(group)})**\n"
        yield "| | compares | source |\n|---|---|---|"
        for name in names.split():
            info = LOSSES[name].info
            yield f"| [`{name}`](#{name}) | {info.compares} | [{info.paper}]({info.url}) |"
    yield "\nThe last group has [controls](#controls)."


def anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def entry(name: str) -> str:
    """Tells all about one loss."""
    loss, info = LOSSES[name], LOSSES[name].info
    paragraphs = [f"### {name}", f"**{info.compares[0].upper()}{info.compares[1:]}**"]
    paragraphs.append("; ".join([f"`topkd.losses.{loss.__name__}`", *references(loss)]))
    paragraphs += [markdown(part) for part in described(loss)]
    for function in explained()[name]:
        first, *rest = described(function)
        paragraphs += [f"`{function.__name__}`: {markdown(first)}", *map(markdown, rest)]
    paragraphs.append("\n".join(options(loss)))
    zero = "is 0" if info.zero else "is not 0"
    width = "" if info.any_width else " Student and teacher need the same numbers of channels."
    facts = f"Cost: {info.cost}. The loss {zero} for a student that equals its teacher.{width}"
    paragraphs += [facts, *recipes_of(name)]
    text = "\n\n".join(part for part in paragraphs if part)
    return re.sub(rf"\[(`\w+`)\]\(#{name}\)", r"\1", text)  # it is here that they are explained


# --- Docstrings ----------------------------------------------------------------------------------


def sections(thing: Any) -> dict[str, str]:
    """Splits a docstring at its headings; what comes first is called ``""``."""
    parts = re.split(
        r"^(Args|Returns|Raises|References|Examples):\n", inspect.getdoc(thing), flags=re.M
    )
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def described(thing: Any) -> list[str]:
    """Gives the paragraphs before the arguments."""
    return re.split(r"\n\s*\n(?!    )", sections(thing)[""].strip())


def references(thing: Any) -> list[str]:
    text = " ".join(sections(thing)["References"].split())
    return [f"[{title.strip()}]({url})" for title, url in re.findall(r"(.+?) (https?://\S+)", text)]


def markdown(paragraph: str) -> str:
    """Turns a paragraph of a docstring into Markdown, in one line."""
    text = " ".join(paragraph.split())
    if text.startswith(".. math::"):
        return f"$${formula(text.removeprefix('.. math::'))}$$"
    text = re.sub(r":math:`(.+?)`", lambda found: f"${formula(found[1])}$", text)
    text = re.sub(r":(?:func|class|mod):`~?([^`]+)`", linked, text)
    return text.replace("``", "`")


def formula(text: str) -> str:
    return " ".join(re.sub(r"\\[^\w\s]", lambda found: ESCAPES[found[0]], text).split())


def linked(reference: re.Match[str]) -> str:
    """Names a function, and leads to where it is explained."""
    if reference[1] == Topological.__module__:
        return "[controls](#controls)"
    if reference[0].startswith(":mod:"):
        return f"`{reference[1]}`"
    name = reference[1].rsplit(".", 1)[-1]
    place = [loss for loss, there in explained().items() if name in {f.__name__ for f in there}]
    return f"[`{name}`](#{place[0]})" if place else f"`{name}`"


@cache
def explained() -> dict[str, list[Callable[..., Any]]]:
    """Finds for every loss the functions that its docstring names, each where it is named first."""
    seen: set[Callable[..., Any]] = set()
    return {
        name: list(_named(LOSSES[name], seen))
        for names in GROUPS.values()
        for name in names.split()
    }


def _named(thing: Any, seen: set[Callable[..., Any]]) -> Iterator[Callable[..., Any]]:
    text = "\n".join(described(thing))
    if inspect.isclass(thing):
        text += "\n".join(arguments(thing)[option] for option in parameters(thing))
    for path in re.findall(r":func:`~?([^`]+)`", text):
        module, _, name = path.rpartition(".")
        function = getattr(importlib.import_module(module or thing.__module__), name)
        if function not in seen:
            seen.add(function)
            yield function
            yield from _named(function, seen)


# --- Options -------------------------------------------------------------------------------------


def parameters(loss: type[Loss]) -> dict[str, inspect.Parameter]:
    """Lists what a recipe may tell a loss."""
    given = inspect.signature(loss.__init__).parameters.values()
    return {p.name: p for p in given if p.kind is p.KEYWORD_ONLY}


def arguments(loss: type[Loss]) -> dict[str, str]:
    """Gives what the docstring of a class says of each argument."""
    told = dedent(sections(loss).get("Args", ""))
    found = re.findall(r"^(\w+): (.*(?:\n +.*)*)", told, flags=re.M)
    return {name: " ".join(text.split()) for name, text in found}


def options(loss: type[Loss]) -> Iterator[str]:
    """Tells name, type, default and meaning of every option, a line of a table each."""
    told, hints = arguments(loss), typing.get_type_hints(loss.__init__)
    for number, (name, parameter) in enumerate(parameters(loss).items()):
        if not number:
            yield "| option | type | default | |\n|---|---|---|---|"
        if is_dataclass(hints[name]):
            yield from _settings(name, hints[name])
        else:
            yield _row(name, hints[name], parameter.default, markdown(told[name]))


def _settings(option: str, kind: Any) -> Iterator[str]:
    """Does the same for an option with fields, which comments describe."""
    hints, source = typing.get_type_hints(kind), inspect.getsource(kind)
    for field in fields(kind):
        told = re.search(rf"^    {field.name}: .*?  # (.*)$", source, flags=re.M)[1]
        told = f"{told[0].upper()}{told[1:]}."
        yield _row(f"{option}.{field.name}", hints[field.name], field.default, told)


def _row(name: str, hint: Any, default: Any, told: str) -> str:
    value = "" if default is None else f" `{json.dumps(default).strip(chr(34))}`"
    return f"| `{name}` | {_kind(hint)} |{value} | {told} |"


def _kind(hint: Any) -> str:
    """Names a type as somebody who writes recipes would."""
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    inner = [part for part in typing.get_args(hint) if part is not type(None)]
    if inner:
        return ", ".join(map(_kind, inner))
    return {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}[hint]


# --- Recipes and controls ------------------------------------------------------------------------


def recipes_of(name: str) -> list[str]:
    """Shows the recipes in which a loss is what matters."""
    return [
        f"```yaml\n# topkd run {title}\n{_lines(title)}\n```"
        for title, matters in _methods().items()
        if matters == name
    ]


@cache
def _methods() -> dict[str, str]:
    """The loss that each recipe is about: not the labels, nor KD where there is another."""
    found = {}
    for title in recipe.names():
        if title.startswith(SHOWN):
            terms = [term.name for term in recipe.load(title).losses]
            found[title] = next((name for name in terms if name not in ("ce", "kd")), "kd")
    return found


def _lines(title: str) -> str:
    """The losses of a recipe, and what else of it is not as in most."""
    usual = ("#", "teacher:", "data: {name: cifar100}", "student: {model: resnet20}")
    text, _, _ = recipe.text(title).partition("\nepochs:")
    return "\n".join(line for line in text.splitlines() if not line.startswith(usual))


def controls() -> Iterator[str]:
    """Tells what the controls ask, and which of them each loss on shape takes."""
    yield CONTROLS + "\n| option | asks |\n|---|---|"
    yield from (f"| `{option}` | {question} |" for option, question in QUESTIONS.items())
    yield "\nWhat makes no control of a loss is refused, with a line that says why:\n"
    yield "| loss | `edges` | `target` |\n|---|---|---|"
    for name in " ".join(GROUPS.values()).split():
        loss = LOSSES[name]
        if issubclass(loss, Topological):
            targets = [t for t in typing.get_args(Target) if t not in loss.no_control]
            cells = [_kind(Literal[tuple(taken)]) for taken in (typing.get_args(Edges), targets)]
            yield f"| [`{name}`](#{name}) | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page(), end="")
