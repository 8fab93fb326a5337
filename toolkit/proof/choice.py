"""Adapter on a quantized base, or the merged model quantized: which is nearer to what was trained, by measurement.

Both are served by the same engine in `toolkit run`, and held against the same training-side logprobs of base and
adapter. Merging first lets the quantizer see the trained weights; quantizing the base keeps one copy for many adapters.
Neither is better for every model, so it is measured for this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.recipe.recipe import ON, Recipe

KL = "kl_to_trained"
TIE = 0.1
"""Divergences that differ by less than this share are a tie; then the task metric decides, and then the merged model,
which costs nothing per adapter."""

Numbers = Mapping[str, Mapping[str, float]]
"""Subject -> metrics of its serve step and of its evaluation."""


@dataclass(frozen=True)
class Choice:
    """Which subject is served, and why."""

    subject: str
    why: str


def rivals(recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Served subjects that are an adapter on a quantized base, and those that are quantized merged models."""
    merged = {q.label for q in recipe.quantize if q.of == "merged"}
    served = recipe.served if recipe.train else ()
    return (
        tuple(s for s in served if s.startswith(ON)),
        tuple(s for s in served if s in merged),
    )


def choose(recipe: Recipe, numbers: Numbers) -> Choice | None:
    """Choose between the two ways; None when the recipe serves at most one of them.

    Args:
        recipe: With ``serve.prefer``.
        numbers: What was measured; subjects that were not are missing.
    """
    on_base, merged = rivals(recipe)
    if recipe.serve is None or not on_base or not merged:
        return None
    if recipe.serve.prefer == "adapter":
        return Choice(on_base[0], "serve.prefer is 'adapter'")
    if recipe.serve.prefer == "merged":
        return Choice(merged[0], "serve.prefer is 'merged'")
    missing = [s for s in (*merged, *on_base) if KL not in numbers.get(s, {})]
    if missing:
        first = next(s for s in recipe.served if s in (*on_base, *merged))
        why = f"{', '.join(missing)} not measured yet: `toolkit run` does that"
        return Choice(first, why)
    return _nearest((*merged, *on_base), numbers, _metric(recipe))


def _nearest(subjects: Sequence[str], numbers: Numbers, metric: str | None) -> Choice:
    best = min(numbers[s][KL] for s in subjects)
    tied = [s for s in subjects if numbers[s][KL] <= best * (1 + TIE)]
    scored = metric is not None and all(metric in numbers[s] for s in tied)
    if len(tied) > 1 and metric is not None and scored:
        tied.sort(key=lambda s: -numbers[s][metric])
    return Choice(tied[0], _shown(subjects, numbers, metric))


def _shown(subjects: Sequence[str], numbers: Numbers, metric: str | None) -> str:
    parts = []
    for subject in subjects:
        score = numbers[subject].get(metric) if metric else None
        shown = "" if score is None else f", {metric} {score:.3f}"
        parts.append(f"{subject}: KL {numbers[subject][KL]:.4f}{shown}")
    return f"measured against what was trained ({'; '.join(parts)})"


def _metric(recipe: Recipe) -> str | None:
    """The recipe's first metric of which more is better."""
    metrics = recipe.evaluate.metrics if recipe.evaluate else ()
    return next((m for m in metrics if m != "perplexity"), None)
