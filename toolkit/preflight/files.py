"""Rules on the files that a recipe names, and on numbers that must leave room for each other."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.facts import Facts
from toolkit.preflight.functions import FunctionFacts
from toolkit.preflight.verdict import Finding, refuse, rule
from toolkit.recipe import Recipe
from toolkit.registry import close_match

METRIC_ARGUMENTS = 3


@rule(
    "files.exist",
    "files that the recipe names are there",
    "seen in advance rather than after the base is fetched",
    "paths start from the recipe's folder",
)
def exist(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Data files and the chat template."""
    for key, path in facts.missing:
        yield refuse(
            f"{key}: {path} is not there (looked in {facts.recipe_dir})",
            "paths start from the recipe's folder",
        )


@rule(
    "files.function",
    "functions that the recipe names are defined and take what they are given",
    "found with ast; the file is not run",
    "define the function, or correct its name",
)
def function(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Each ``file.py:function``."""
    for found in facts.functions:
        yield from _function(found)


def _function(found: FunctionFacts) -> Iterator[Finding]:
    name = found.text.rpartition(":")[2]
    if found.problem:
        near = close_match(name, found.defined)
        defined = (
            f"the file defines {', '.join(found.defined)}"
            if found.defined
            else "write 'file.py:function', relative to the recipe"
        )
        yield refuse(f"{found.where}: {found.problem}{near}", defined)
        return
    if found.given is None:
        yield from _metric(found, name)
        return
    if found.where.startswith("train.grpo.rewards"):
        yield from _reward(found, name)
        return
    for argument in found.given:
        if found.accepts is not None and argument not in found.accepts:
            near = close_match(argument, found.accepts)
            takes = ", ".join(found.accepts) or "no arguments"
            yield refuse(
                f"{found.where}: {name}() takes no argument {argument!r}{near}",
                f"it takes: {takes}",
            )
    for argument in found.requires:
        if argument not in found.given:
            key = found.where.removesuffix(".python")
            yield refuse(
                f"{found.where}: {name}() needs the argument {argument!r}",
                f"add it under {key}.arguments",
            )


def _reward(found: FunctionFacts, name: str) -> Iterator[Finding]:
    """Training calls a reward by keywords, with those of its columns that it takes."""
    if found.accepts is not None and "completions" not in found.accepts:
        yield refuse(
            f"{found.where}: {name}() does not take the answers",
            f"define it as: def {name}(prompts, completions, **columns) -> list[float]",
        )


def _metric(found: FunctionFacts, name: str) -> Iterator[Finding]:
    """The evaluation calls a metric with ``(prediction, reference, row)``."""
    if found.positional is None or found.positional[0] <= METRIC_ARGUMENTS <= found.positional[1]:
        return
    yield refuse(
        f"{found.where}: {name}() takes {found.positional[1]} arguments, but a metric is given 3",
        f"define it as: def {name}(prediction, reference, row) -> float",
    )


@rule(
    "evaluate.room",
    "an answer leaves room for its question",
    "the served context is model.max_length tokens",
    "lower evaluate.max_new_tokens or raise model.max_length",
)
def room(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """``max_new_tokens`` below ``max_length``."""
    section = recipe.evaluate
    if section and section.max_new_tokens >= recipe.model.max_length:
        yield refuse(
            f"evaluate.max_new_tokens is {section.max_new_tokens}, but model.max_length is "
            f"{recipe.model.max_length}: no room for a question",
            "lower evaluate.max_new_tokens or raise model.max_length",
        )


@rule(
    "evaluate.gates",
    "every gate speaks of a model that is scored and of a metric that is measured",
    "a gate on something else could only fail, after all the work",
    "add the model to evaluate.of, the metric to evaluate.metrics",
)
def gates(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Metrics of lm-eval tasks are known only when they ran."""
    section = recipe.evaluate
    for gate in section.gates if section else ():
        subjects = (gate.of, gate.against) if gate.max_drop is not None else (gate.of,)
        for subject in dict.fromkeys(subjects):
            if subject not in recipe.evaluated:
                yield refuse(
                    f"evaluate.gates: {subject!r} is not scored",
                    f"add it to evaluate.of, which has {', '.join(recipe.evaluated)}",
                )
        if section and not section.lm_eval and gate.metric not in section.metrics:
            near = close_match(gate.metric, section.metrics)
            yield refuse(
                f"evaluate.gates: {gate.metric!r} is not measured{near}",
                f"add it to evaluate.metrics, which has {', '.join(section.metrics)}",
            )


RULES = (exist, function, room, gates)
