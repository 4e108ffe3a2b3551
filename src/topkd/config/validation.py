"""Strict validation of settings: YAML and located errors."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeGuard

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

LARGEST, DEEPEST = 100_000, 100  # maximum number of YAML nodes, and of nested levels
_MERGE = "tag:yaml.org,2002:merge"
_OTHERWISE = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}


class RecipeError(ValueError):
    """Raised for an invalid recipe; the message gives the key, the value and valid values."""


class Section(BaseModel):
    """Immutable settings that reject unknown keys and wrong types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def parse_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    where: str,
    *,
    siblings: Sequence[str] = (),
) -> Any:
    """Checks options against the keyword-only arguments of a function.

    Args:
        function: Function that takes the options.
        options: Options from a recipe.
        where: Location in the recipe, for messages.
        siblings: Other valid keys at this location, for suggestions.

    Returns:
        The parsed options, as keyword arguments.

    Raises:
        RecipeError: If an option is unknown, missing or of the wrong type.
    """
    hints = typing.get_type_hints(function)
    fields: dict[str, Any] = {
        parameter.name: (
            hints[parameter.name],
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    model = create_model("Options", __base__=Section, **fields)
    parsed = validated(model, options, where, siblings=siblings)
    return {name: getattr(parsed, name) for name in parsed.model_fields_set}


def validated(
    model: type[BaseModel], tree: Mapping[str, Any], where: str, *, siblings: Sequence[str] = ()
) -> Any:
    """Validates plain values and returns a section.

    Args:
        model: Class of the section.
        tree: Plain values.
        where: Location in the recipe, for messages.
        siblings: Other valid keys at this location, for suggestions.

    Raises:
        RecipeError: If a key or a value is invalid; the message lists all of them.
    """
    try:
        # In JSON mode, strict validation accepts lists as tuples and mappings as dataclasses.
        return model.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A list with one invalid item is also reported as too short; the item's error suffices.
        inner = [e for e in errors if e["type"] != "too_short"] or errors
        lines = [_explain(model, tree, where, dict(e), siblings) for e in inner]
        raise RecipeError("\n".join(lines)) from None


def _explain(
    model: Any, tree: Any, where: str, error: dict[str, Any], siblings: Sequence[str]
) -> str:
    """Formats an error: location, value and valid values."""
    path, known, got = ("" if where == "recipe" else where), _fields(model), tree
    steps = list(error["loc"])
    for number, step in enumerate(steps):
        if _has(got, step):
            last = number == len(steps) - 1
            path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
            got = got[step]
            if not last:
                model = _inside(model, step)
                known = _fields(model)
        elif error["type"] == "missing":
            path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        others = siblings if len(steps) == 1 else ()
        key = str(steps[-1])
        return f"{path}: unknown key{near(key, [*known, *others], otherwise=near(key, known))}"
    if error["type"] == "missing":
        return f"{path}: missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path or 'recipe'}: expected {message.removeprefix('a valid ')}, got {got!r}"


def _has(got: Any, step: Any) -> bool:
    if isinstance(got, Mapping):
        return step in got
    return isinstance(got, list) and isinstance(step, int) and step < len(got)


def _fields(model: Any) -> list[str]:
    if _is_section(model):
        return list(model.model_fields)
    return list(getattr(model, "__dataclass_fields__", ()))


def _is_section(model: Any) -> TypeGuard[type[BaseModel]]:
    # In Python 3.10 `tuple[int, ...]` is an instance of `type` as well, but not a class.
    is_class = isinstance(model, type) and typing.get_origin(model) is None
    return is_class and issubclass(model, BaseModel)


def _inside(model: Any, step: Any) -> Any:
    """Returns the type of a field, or of the items of a container."""
    if _is_section(model):
        model = model.model_fields[step].annotation if step in model.model_fields else None
    else:
        model = next((a for a in typing.get_args(model)[::-1] if a is not ...), None)
    while typing.get_origin(model) is Annotated:
        model = typing.get_args(model)[0]
    options = [a for a in typing.get_args(model) if isinstance(a, type) and _fields(a)]
    is_union = type(None) in typing.get_args(model)
    return options[0] if is_union and options else model


def near(word: str, words: Sequence[str], otherwise: str | None = None) -> str:
    """Returns a suggestion for an unknown word: the closest known word, or all of them.

    Args:
        word: The unknown word.
        words: The known words; case is ignored.
        otherwise: Text to use instead of the list of all words.

    Examples:
        >>> near("CRD", ["crd", "ctkd"])
        "; did you mean 'crd'?"
        >>> near("wieght", ["weight", "taps"])
        "; did you mean 'weight'?"
    """
    folded = {known.casefold(): known for known in reversed(words)}
    close = get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    if otherwise is not None:
        return otherwise
    return f"; there are {', '.join(words)}" if words else ""


def is_section_of(model: Any, key: str) -> bool:
    """Returns whether a dotted key of a section is itself a section.

    Examples:
        >>> from topkd.config.recipe import Recipe
        >>> is_section_of(Recipe, "optimizer"), is_section_of(Recipe, "optimizer.lr")
        (True, False)
        >>> is_section_of(Recipe, "teacher"), is_section_of(Recipe, "data.randaugment")
        (True, True)
    """
    for step in key.split("."):
        if not _is_section(model) or step not in model.model_fields:
            return False
        model = _inside(model, step)
    return _is_section(model)


def read_yaml(text: str, where: str) -> Any:
    """Reads YAML in bounded time and memory.

    Numbers follow YAML 1.2: ``1e-4`` is a number, and ``1:30`` is text.

    Args:
        text: The YAML.
        where: Name of the source, for messages.

    Raises:
        RecipeError: If the text is not YAML, has a duplicate key or a key that is not text, is
            recursive, or is too large or nested too deep.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{where} is not YAML: {error.problem}{place}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where} is not YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise RecipeError(f"{where} is nested too deep") from error


def _check_size(root: yaml.Node) -> None:
    """Rejects YAML that is too large after its aliases are expanded, or that is recursive."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise yaml.YAMLError(f"the node in line {node.start_mark.line + 1} contains itself")
        if len(above) > DEEPEST:
            raise RecursionError
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            inner = [n for part in parts for n in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(size(each, (*above, id(node))) for each in inner)
        return sizes[id(node)]

    if size(root, ()) > LARGEST:
        raise yaml.YAMLError(f"it has more than {LARGEST:,} parts")


class _Loader(yaml.SafeLoader):
    """YAML loader with unique text keys and the numbers of YAML 1.2."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERWISE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        nodes = [key for key, _ in node.value if key.tag != _MERGE]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for number, (key, at) in enumerate(zip(keys, nodes, strict=True)):
            line = at.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} in line {line} is not text; quote it")
            if key in keys[:number]:
                raise yaml.YAMLError(f"the key {key!r} appears twice, again in line {line}")
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes text which this loader or YAML 1.1 would not read as text."""


def write_yaml(tree: Any) -> str:
    """Writes plain values as YAML that this loader and YAML 1.1 loaders read identically."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_INT = r"^[-+]?(0|[1-9][\d_]*)$"
_FLOAT = r"^([-+]?(\d[\d_]*\.\d*|\.\d+|(\d+\.?\d*|\.\d+)[eE][-+]?\d+|\.inf)|\.nan)$"
for _kind in (_Loader, _Dumper):
    for _tag, _pattern in (("int", _INT), ("float", _FLOAT)):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(_pattern, re.IGNORECASE), list("-+0123456789.")
        )
