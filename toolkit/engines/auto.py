"""``serve.engine: auto``: which engine, and why, in one sentence.

Preflight judges the recipe once for each engine; :func:`choose` compares the answers. So the choice knows every rule on
adapters, formats, options and machines without repeating one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ORDER = ("vllm", "sglang")
"""The first choice first: vLLM loads more kinds of adapters, and runs on a CPU too."""


@dataclass(frozen=True)
class Candidate:
    """An engine, looked at for one recipe on one machine.

    Attributes:
        name: ``vllm`` or ``sglang``.
        objections: What preflight refuses with this engine.
        knows_model: Whether the base's architecture is among those that it names; ``None`` where the base is not
            here yet.
        architecture: Of the base.
        ready: Whether its environment is built (or given by the profile).
    """

    name: str
    objections: tuple[str, ...] = ()
    knows_model: bool | None = None
    architecture: str | None = None
    ready: bool = False


@dataclass(frozen=True)
class Choice:
    """What ``auto`` came to."""

    engine: str
    reason: str
    """The rest of a sentence that begins with the engine's name."""


def choose(candidates: Sequence[Candidate]) -> Choice:
    """The engine that refuses least, then knows the model, then is built; at last the first of :data:`ORDER`."""
    best, *rest = sorted(candidates, key=lambda one: _cost(one, candidates))
    reasons = [_against(best, other, _shared(candidates)) for other in rest]
    return Choice(best.name, "; ".join(reasons) or "the only one")


def _cost(one: Candidate, all_of_them: Sequence[Candidate]) -> tuple[int, bool, bool, int]:
    own = [text for text in one.objections if text not in _shared(all_of_them)]
    return len(own), one.knows_model is False, not one.ready, ORDER.index(one.name)


def _shared(candidates: Sequence[Candidate]) -> frozenset[str]:
    """What every engine objects to is no reason for another."""
    return frozenset.intersection(*(frozenset(one.objections) for one in candidates))


def _against(best: Candidate, other: Candidate, shared: frozenset[str]) -> str:
    """Why ``best`` and not ``other``."""
    own = [text for text in other.objections if text not in shared]
    if len(own) > sum(text not in shared for text in best.objections):
        return f"{other.name} would be refused ({own[0]})"
    if other.knows_model is False and best.knows_model is not False:
        return f"{other.name} does not know the architecture {other.architecture}"
    if best.ready and not other.ready:
        return f"its environment is built and that of {other.name} is not"
    return f"{other.name} could too, and {best.name} is the first choice"
