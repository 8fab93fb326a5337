"""Adapter on a quantized base, or the merged model quantized: which is nearer to what was trained, by measurement.

Both are served by the same engine in `toolkit run`, and held against the same training-side logprobs of base and
adapter. Merging first lets the quantizer see the trained weights; quantizing the base keeps one copy for many adapters.
Neither is better for every model, so it is measured for this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from toolkit.recipe.recipe import ON, Recipe

KL = "kl_to_trained"
TIE = 0.1
"""Divergences that differ by less than this share are a tie; then the task metric decides, and then the merged model,
which costs nothing per adapter."""

Numbers = Mapping[str, Mapping[str, float]]
"""Subject -> ``kl_to_trained`` of its serve step and the task metric of its evaluation."""


@dataclass(frozen=True)
class Rivals:
    """Two ways to serve one tuned model.

    Attributes:
        subjects: Adapters on quantized bases and quantized merged models, as ``serve.models`` orders them.
        prefer: ``serve.prefer``.
        metric: The task metric that decides a tie; None where nothing is evaluated.
    """

    subjects: tuple[str, ...]
    prefer: str
    metric: str | None = None

    @property
    def on_base(self) -> tuple[str, ...]:
        """Adapters on a quantized base."""
        return tuple(s for s in self.subjects if s.startswith(ON))

    @property
    def merged(self) -> tuple[str, ...]:
        """Quantized merged models."""
        return tuple(s for s in self.subjects if not s.startswith(ON))


@dataclass(frozen=True)
class Choice:
    """Which subject is served, why, and what was measured of each."""

    subject: str
    why: str
    numbers: Numbers = field(default_factory=dict)


def rivals(recipe: Recipe) -> Rivals | None:
    """The two ways that a recipe serves; None when it serves at most one of them."""
    if recipe.serve is None or recipe.train is None:
        return None
    quantized = {q.label for q in recipe.quantize if q.of == "merged"}
    subjects = tuple(s for s in recipe.served if s.startswith(ON) or s in quantized)
    found = Rivals(subjects, recipe.serve.prefer, _metric(recipe))
    return found if found.on_base and found.merged else None


def numbers_of(subject: str, served: Mapping[str, float], scored: Mapping[str, float]) -> Numbers:
    """What counts of a subject: the divergence of its serve step, all else of its evaluation.

    A serve step's own score is of the two rows that it asks: not the task metric.
    """
    kl = {KL: served[KL]} if KL in served else {}
    return {subject: {**scored, **kl}}


def choose(rivals: Rivals, numbers: Numbers) -> Choice:
    """Choose between the two ways.

    Args:
        rivals: Of the recipe.
        numbers: What was measured; subjects that were not are missing.
    """
    kept = {KL, rivals.metric}
    numbers = {s: {k: v for k, v in of.items() if k in kept} for s, of in numbers.items()}
    shown = _shown(rivals, numbers)
    if rivals.prefer != "measured":
        first = (rivals.on_base if rivals.prefer == "adapter" else rivals.merged)[0]
        return Choice(first, "; ".join([f"serve.prefer is {rivals.prefer!r}", *shown]), numbers)
    missing = [s for s in (*rivals.merged, *rivals.on_base) if KL not in numbers.get(s, {})]
    if missing:
        why = f"{', '.join(missing)} not measured yet: `toolkit run` does that"
        return Choice(rivals.subjects[0], why, numbers)
    why = f"measured against what was trained ({'; '.join(shown)})"
    return Choice(_nearest(rivals, numbers), why, numbers)


def _nearest(rivals: Rivals, numbers: Numbers) -> str:
    subjects, metric = (*rivals.merged, *rivals.on_base), rivals.metric
    best = min(numbers[s][KL] for s in subjects)
    tied = [s for s in subjects if numbers[s][KL] <= best * (1 + TIE)]
    if metric is not None and all(metric in numbers[s] for s in tied):
        tied.sort(key=lambda s: -numbers[s][metric])
    return tied[0]


def _shown(rivals: Rivals, numbers: Numbers) -> Sequence[str]:
    """The numbers of every subject that has some, in words."""
    parts = []
    for subject in (*rivals.merged, *rivals.on_base):
        found = numbers.get(subject, {})
        said = [f"KL {found[KL]:.4f}"] if KL in found else []
        if rivals.metric and rivals.metric in found:
            said.append(f"{rivals.metric} {found[rivals.metric]:.3f}")
        if said:
            parts.append(f"{subject}: {', '.join(said)}")
    return parts


def _metric(recipe: Recipe) -> str | None:
    """The recipe's first metric of which more is better."""
    metrics = recipe.evaluate.metrics if recipe.evaluate else ()
    return next((m for m in metrics if m != "perplexity"), None)
