"""Strict YAML: a file, then ``--set``, then a frozen pydantic model. All mistakes at once, each with file and line.

Recipes and profiles are both read by :func:`read`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from toolkit.errors import Problem, RecipeError
from toolkit.registry import close_match

Location = tuple[str | int, ...]

M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them: ``1e-4`` is a number (YAML 1.1 reads it as text), dates stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":float", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((\d[\d_]*)?\.\d[\d_]*|\d[\d_]*\.?)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"
    ),
    list("-+0123456789."),
)


def read(path: Path, model: type[M], overrides: Sequence[str] = ()) -> M:
    """Read the YAML file at ``path`` as ``model``, changed by ``KEY.PATH=VALUE`` overrides.

    Raises:
        RecipeError: With every problem: where, the key's path, what is wrong and the likely key.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            [Problem(str(path), "", f"is not UTF-8 text (byte {error.start})")]
        ) from error
    tree, lines = _compose(text, str(path))
    for override in overrides:
        _apply(override, tree, lines)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        places = _Places(str(path), lines, model)
        raise RecipeError(_problems(error.errors(), places)) from error


def _compose(text: str, name: str) -> tuple[dict[str, Any], dict[Location, str | int]]:
    """Parse YAML into plain values and the line of every key."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise RecipeError(
                [Problem(name, "", "is empty")], "`toolkit init` writes a recipe to start from"
            )
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(
                [
                    Problem(
                        f"{name}:1",
                        "",
                        "is not a mapping of keys to values",
                    )
                ]
            )
        duplicates = [
            Problem(f"{name}:{line}", key, f"stands twice; first on line {first}")
            for key, line, first in _duplicates(root)
        ]
        if duplicates:
            raise RecipeError(duplicates)
        lines = dict(_lines(root, ()))
        tree: dict[str, Any] = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            [Problem(f"{name}:{line}", "", f"is not YAML: {error.problem}")]
        ) from error
    return tree, lines


def _lines(node: yaml.Node, at: Location) -> Iterator[tuple[Location, str | int]]:
    yield at, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _lines(value, (*at, key.value))
            yield (*at, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*at, index))


def _duplicates(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    children = (
        [(str(i), v) for i, v in enumerate(node.value)]
        if isinstance(node, yaml.SequenceNode)
        else []
    )
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                yield prefix + key.value, line, seen[key.value]
            seen[key.value] = line
            children.append((key.value, value))
    for name, child in children:
        yield from _duplicates(child, f"{prefix}{name}.")


def _apply(override: str, tree: dict[str, Any], lines: dict[Location, str | int]) -> None:
    """Change one value in place; its place in errors becomes the option itself."""
    where = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            [Problem(where, "", "is not KEY.PATH=VALUE, such as train.learning_rate=1e-4")]
        )
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(
            [Problem(where, key, f"{text!r} is not a YAML value: quote it")]
        ) from error
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node: Any = tree
    for depth, part in enumerate(parents):
        try:
            missing = isinstance(node, dict) and node.get(part) is None
            node = node.setdefault(part, {}) if missing and part not in node else node[part]
        except (KeyError, IndexError, TypeError) as error:
            path = _dotted(tuple(parents[: depth + 1]))
            raise RecipeError([Problem(where, path, "does not exist in the file")]) from error
        lines.setdefault(tuple(parents[: depth + 1]), where)
    try:
        node[last] = value
    except (IndexError, TypeError) as error:
        raise RecipeError([Problem(where, key, "has no such place in the file")]) from error
    lines[(*parents, last)] = where


@dataclass(frozen=True)
class _Places:
    file: str
    lines: Mapping[Location, str | int]
    model: type[BaseModel]

    def known(self, location: Location) -> Location:
        """The part of a pydantic location that exists in the file: union members and defaults fall away."""
        at: Location = ()
        for part in location:
            if (*at, part) in self.lines:
                at = (*at, part)
        return at

    def of(self, location: Location) -> str:
        place = self.lines.get(self.known(location), 1)
        return place if isinstance(place, str) else f"{self.file}:{place}"


def _problems(errors: Sequence[Any], places: _Places) -> list[Problem]:
    """One problem per mistake: a list that is "too short" only because its members are wrong is no second one."""
    locations = [tuple(e["loc"]) for e in errors]
    kept = [
        e
        for e in errors
        if e["type"] != "too_short"
        or not any(x[: len(e["loc"])] == e["loc"] != x for x in locations)
    ]
    return [_problem(e, places) for e in kept]


def _problem(error: Any, places: _Places) -> Problem:
    location: Location = error["loc"]
    at = places.known(location)
    kind, given = error["type"], error.get("input")
    if kind == "extra_forbidden":
        at = (*places.known(location[:-1]), location[-1])
        return Problem(
            places.of(location), _dotted(at), f"is not a key here{_likely(places.model, at)}"
        )
    if kind == "missing":
        return Problem(places.of(location), _dotted((*at, location[-1])), "is missing")
    message = error["msg"].removeprefix("Value error, ")
    if kind != "value_error" and not isinstance(given, dict | list | BaseModel):
        message = f"is {given!r}: {message[0].lower()}{message[1:]}"
    if kind == "literal_error" and isinstance(given, str):
        message += close_match(given, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return Problem(places.of(location), _dotted(at), message)


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _likely(root: type[BaseModel], at: Location) -> str:
    """The key that the user likely meant: a near name in the same section, else the same name in another."""
    section, wrong = section_at(root, at[:-1]), str(at[-1])
    here = tuple(section.model_fields) if section else ()
    initials = {"".join(word[0] for word in key.split("_")): key for key in here}
    if wrong in initials:  # lr -> learning_rate
        return f" (did you mean {initials[wrong]!r}?)"
    if near := close_match(wrong, here):
        return near
    elsewhere = [key for key in all_keys(root) if key.rpartition(".")[2] == wrong]
    if elsewhere:
        return f" (did you mean {elsewhere[0]!r}?)"
    return f"; known: {', '.join(here)}" if here else ""


def section_at(root: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The model that describes a place in a file; list indexes are passed over."""
    model: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        model = _section_in(field.annotation) if field else None
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key a file can have, dotted."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if inner := _section_in(field.annotation):
            yield from all_keys(inner, f"{prefix}{name}.")
