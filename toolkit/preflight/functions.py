"""Functions that a recipe names as ``file.py:function``: found with ``ast``, never by import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.recipe import Recipe
from toolkit.recipe.evaluate import BUILTIN_METRICS


@dataclass(frozen=True)
class FunctionFacts:
    """A ``file.py:function`` of the recipe."""

    text: str
    where: str
    """The key of the recipe that names it."""
    problem: str | None = None
    defined: tuple[str, ...] = ()
    """Functions at the top of the file."""
    accepts: tuple[str, ...] | None = None
    """Names the function takes as keywords; ``None`` when it takes any."""
    requires: tuple[str, ...] = ()
    """Names without a default."""
    given: tuple[str, ...] | None = None
    """Keywords the recipe passes; ``None`` when the toolkit calls it with its own."""


def read_functions(recipe: Recipe, recipe_dir: Path) -> Iterator[FunctionFacts]:
    """Every function that the recipe names."""
    if recipe.data:
        groups = (
            ("data.sources", recipe.data.sources),
            ("data.heldout.sources", recipe.data.heldout.sources),
        )
        for key, sources in groups:
            for i, source in enumerate(sources):
                if source.python is not None:
                    yield read_function(
                        source.python, recipe_dir, f"{key}.{i}.python", tuple(source.arguments)
                    )
    for i, metric in enumerate(recipe.evaluate.metrics if recipe.evaluate else ()):
        if metric not in BUILTIN_METRICS:
            yield read_function(metric, recipe_dir, f"evaluate.metrics.{i}", None)


def read_function(
    text: str, recipe_dir: Path, where: str, given: tuple[str, ...] | None
) -> FunctionFacts:
    """Find ``file.py:function`` without running the file."""
    file, _, name = text.rpartition(":")
    path = recipe_dir / Path(file).expanduser()
    try:
        tree = ast.parse(path.read_text())
    except OSError:
        return FunctionFacts(text, where, f"{file} is not there")
    except (SyntaxError, ValueError) as error:
        return FunctionFacts(text, where, f"{file} is not Python: {error}")
    found = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    if name not in found:
        return FunctionFacts(text, where, f"{file} defines no function {name!r}", tuple(found))
    arguments = found[name].args
    plain = [*arguments.args, *arguments.kwonlyargs]
    first_optional = len(arguments.args) - len(arguments.defaults)
    optional = [a.arg for a in arguments.args[first_optional:]]
    optional += [
        a.arg
        for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if d is not None
    ]
    return FunctionFacts(
        text,
        where,
        defined=tuple(found),
        accepts=None if arguments.kwarg else tuple(a.arg for a in plain),
        requires=tuple(a.arg for a in plain if a.arg not in optional),
        given=given,
    )
