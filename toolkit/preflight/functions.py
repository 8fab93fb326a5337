"""Functions that a recipe names as ``file.py:function``: found with ``ast``, never by import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.recipe import Recipe
from toolkit.recipe.evaluate import BUILTIN_METRICS

REWARD_GIVEN = ("prompts", "completions")
"""What a reward function always gets; columns of the rows come by keyword as well."""
_Function = ast.FunctionDef | ast.AsyncFunctionDef


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
    positional: tuple[int, int] | None = None
    """How many arguments it needs and takes by position; ``None`` when that is not known."""
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
    grpo = recipe.train.grpo if recipe.train else None
    for i, reward in enumerate(grpo.rewards if grpo else ()):
        yield read_function(reward, recipe_dir, f"train.grpo.rewards.{i}", REWARD_GIVEN)
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
    found = _names(tree)
    if name not in found:
        return FunctionFacts(text, where, f"{file} defines no function {name!r}", tuple(found))
    known = found[name]
    if known is None or known.decorator_list:  # what it takes is only known by running the file
        return FunctionFacts(text, where, defined=tuple(found))
    return _signature(FunctionFacts(text, where, defined=tuple(found), given=given), known.args)


def _names(tree: ast.Module) -> dict[str, _Function | None]:
    """Names at the top of a file that may be functions; ``None`` where only running it would tell."""
    found: dict[str, _Function | None] = {}
    for node in tree.body:
        if isinstance(node, _Function):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name): None for alias in node.names}
        elif not isinstance(node, ast.ClassDef):  # an assignment, or an if or try around one
            bound = (n for n in ast.walk(node) if isinstance(n, _Function | ast.Name))
            found |= {n.name if isinstance(n, _Function) else n.id: None for n in bound}
    return found


def _signature(facts: FunctionFacts, arguments: ast.arguments) -> FunctionFacts:
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    needed = positional[: len(positional) - len(arguments.defaults)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    needed_keywords = [a.arg for a, default in keywords if default is None]
    named = [a.arg for a in (*arguments.args, *arguments.kwonlyargs)]
    return replace(
        facts,
        accepts=None if arguments.kwarg else tuple(named),
        requires=(*needed, *needed_keywords),
        positional=None if arguments.vararg or needed_keywords else (len(needed), len(positional)),
    )
