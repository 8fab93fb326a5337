"""What a rule is and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from toolkit.preflight.facts import Facts
from toolkit.recipe import Recipe


class Outcome(StrEnum):
    """``ok``: it holds. ``warn``: it works, but not as one may think. ``refuse``: it cannot."""

    ok = "ok"
    warn = "warn"
    refuse = "refuse"


@dataclass(frozen=True)
class Finding:
    """One thing a rule has to say about a recipe."""

    outcome: Outcome
    message: str
    hint: str


def refuse(message: str, hint: str) -> Finding:
    """It cannot work; ``hint`` is the fix."""
    return Finding(Outcome.refuse, message, hint)


def warn(message: str, hint: str) -> Finding:
    """It works, but slower or otherwise than one may think; ``hint`` is what to do instead."""
    return Finding(Outcome.warn, message, hint)


@dataclass(frozen=True)
class Verdict:
    """What one rule says about one recipe."""

    rule: str
    outcome: Outcome
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.message} [{self.rule}]" + (f"\n  fix: {self.hint}" if self.hint else "")


Find = Callable[[Recipe, Facts], Iterable[Finding]]


@dataclass(frozen=True)
class Rule:
    """A statement that must hold before anything starts, with the place where it was learned."""

    id: str
    must: str
    """What must hold, one line."""
    source: str
    """Where this was read or measured."""
    find: Find

    def judge(self, recipe: Recipe, facts: Facts) -> list[Verdict]:
        """One verdict for each finding, or a single ``ok``."""
        found = [Verdict(self.id, f.outcome, f.message, f.hint) for f in self.find(recipe, facts)]
        return found or [Verdict(self.id, Outcome.ok, self.must)]


def rule(id: str, must: str, source: str) -> Callable[[Find], Rule]:  # noqa: A002
    """Make a :class:`Rule` of a function that yields findings."""
    return lambda find: Rule(id, must, source, find)
