"""Preflight: says before anything starts what cannot work, and names the fix.

Runs in the core (no torch, no GPU, no network) in milliseconds::

    facts = gather(recipe, recipe_dir, accelerator="cuda")
    warnings = require(check(recipe, facts))  # raises PreflightError with all refusals
"""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.errors import PreflightError
from toolkit.preflight import adapters, base, files, quantization, serving
from toolkit.preflight.facts import LOCKED_ENGINES, Accelerator, Facts, gather
from toolkit.preflight.verdict import Outcome, Rule, Verdict
from toolkit.recipe import Recipe

RULES: tuple[Rule, ...] = (
    *base.RULES,
    *files.RULES,
    *quantization.RULES,
    *serving.RULES,
    *adapters.RULES,
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
    "check",
    "gather",
    "require",
]


def check(recipe: Recipe, facts: Facts) -> list[Verdict]:
    """Judge a recipe by every rule; a rule that has nothing to say gives one ``ok``."""
    return [verdict for one in RULES for verdict in one.judge(recipe, facts)]


def require(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the warnings.

    Raises:
        PreflightError: Something is refused; the message holds every refusal, each with its fix.
    """
    refused = [v for v in verdicts if v.outcome is Outcome.refuse]
    if refused:
        raise PreflightError(
            "\n".join(map(str, refused)), f"{len(refused)} refused before anything was started"
        )
    return [v for v in verdicts if v.outcome is Outcome.warn]
