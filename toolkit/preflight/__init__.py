"""Preflight: says before anything starts what cannot work, and names the fix.

Runs in the core (no torch, no GPU, no network) in milliseconds. ``facts.py`` reads, rules do not::

    verdicts = check(recipe, gather(recipe, recipe_dir, accelerator="cuda"))
    warnings = insist(verdicts)  # raises PreflightError with all refusals
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import PreflightError
from toolkit.preflight import (
    adapters,
    base,
    capacity,
    context,
    files,
    fp8_base,
    memory,
    objectives,
    parallel,
    quantization,
    serving,
    tensors,
    trained,
)
from toolkit.preflight.facts import LOCKED_ENGINES, Accelerator, Facts, gather
from toolkit.preflight.machine import Environment, gather_here
from toolkit.preflight.verdict import Outcome, Rule, Verdict
from toolkit.recipe import Recipe

if TYPE_CHECKING:
    from toolkit.plan import Plan
    from toolkit.recipe.load import Loaded
    from toolkit.workspace import Workspace

RULES: tuple[Rule, ...] = (
    *base.RULES,
    *context.RULES,
    *files.RULES,
    *fp8_base.RULES,
    *objectives.RULES,
    *parallel.RULES,
    *quantization.RULES,
    *serving.RULES,
    *capacity.RULES,
    *memory.RULES,
    *trained.RULES,
    *adapters.RULES,
    *tensors.RULES,
)
"""Every rule, in the order in which verdicts are shown."""

__all__ = [
    "LOCKED_ENGINES",
    "RULES",
    "Accelerator",
    "Facts",
    "Outcome",
    "Rule",
    "Verdict",
    "at_best",
    "check",
    "gather",
    "gather_here",
    "insist",
    "require",
]


def require(
    loaded: Loaded,
    plan: Plan,
    workspace: Workspace,
    environments: Mapping[str, Environment],
    accelerator: Accelerator | None = None,
) -> list[Verdict]:
    """Judge a planned recipe on this machine; return the warnings.

    Raises:
        PreflightError: Something is refused; the message holds every refusal, each with its fix.
    """
    facts = gather_here(loaded, plan, workspace, environments, accelerator)
    return insist(check(loaded.recipe, facts))


def check(recipe: Recipe, facts: Facts) -> list[Verdict]:
    """Judge a recipe by every rule; a rule that has nothing to say gives one ``ok``."""
    return [verdict for one in RULES for verdict in one.judge(recipe, facts)]


ON_DISK = ("files.exist", "files.function", "model.readable", "adapter.readable")
"""Rules about files that may be on another machine than the one that validates."""


def at_best(recipe: Recipe, recipe_dir: Path) -> list[Verdict]:
    """Judge a recipe apart from any machine: on the accelerator that suits it best.

    Rules of :data:`ON_DISK` are left out: the files may be where it will run.
    """
    places: tuple[Accelerator, ...] = ("cpu", "cuda")
    judged = [check(recipe, gather(recipe, recipe_dir, accelerator=place)) for place in places]
    best = min(judged, key=lambda verdicts: [_refused(verdicts), _warned(verdicts)])
    return [v for v in best if v.rule not in ON_DISK]


def _refused(verdicts: Sequence[Verdict]) -> int:
    return sum(v.outcome is Outcome.refuse for v in verdicts)


def _warned(verdicts: Sequence[Verdict]) -> int:
    return sum(v.outcome is Outcome.warn for v in verdicts)


def insist(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the warnings.

    Raises:
        PreflightError: Something is refused; the message holds every refusal, each with its fix.
    """
    refused = [v for v in verdicts if v.outcome is Outcome.refuse]
    if refused:
        count = f"{len(refused)} {'thing' if len(refused) == 1 else 'things'} to mend"
        raise PreflightError("\n".join(map(str, refused)), f"{count}; nothing was started")
    return [v for v in verdicts if v.outcome is Outcome.warn]
