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
    source: str | None = None
    """Where this very thing was learned; that of the rule unless given."""


def refuse(message: str, hint: str, source: str | None = None) -> Finding:
    """It cannot work; ``hint`` is the fix."""
    return Finding(Outcome.refuse, message, hint, source)


def warn(message: str, hint: str, source: str | None = None) -> Finding:
    """It works, but slower or otherwise than one may think; ``hint`` is what to do instead."""
    return Finding(Outcome.warn, message, hint, source)


@dataclass(frozen=True)
class Verdict:
    """What one rule says about one recipe."""

    rule: str
    outcome: Outcome
    message: str
    hint: str | None = None
    source: str = ""
    """Where it was learned: a file of an engine's source, an issue, a measurement."""

    def __str__(self) -> str:
        return f"{self.message} [{self.rule}]" + (f"\n  fix: {self.hint}" if self.hint else "")

    def as_json(self) -> dict[str, str | None]:
        """For ``--json``."""
        return {
            "rule": self.rule,
            "outcome": str(self.outcome),
            "message": self.message,
            "hint": self.hint,
            "source": self.source,
        }


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
    fix: str = ""
    """What one does about it, in general; a verdict's hint says it for the case."""
    tried: tuple[str, ...] = ()
    """Engines and versions on which a test compares the rule with what the engine does."""

    def judge(self, recipe: Recipe, facts: Facts) -> list[Verdict]:
        """One verdict for each finding, or a single ``ok``."""
        found = [
            Verdict(self.id, f.outcome, f.message, f.hint, f.source or self.source)
            for f in self.find(recipe, facts)
        ]
        return found or [Verdict(self.id, Outcome.ok, self.must, source=self.source)]


def rule(
    id: str,  # noqa: A002
    must: str,
    source: str,
    fix: str,
    tried: tuple[str, ...] = (),
) -> Callable[[Find], Rule]:
    """Make a :class:`Rule` of a function that yields findings."""
    return lambda find: Rule(id, must, source, find, fix, tried)
