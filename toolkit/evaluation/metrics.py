"""Metrics of one generated answer: ``metric(prediction, reference, row) -> float``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, UsageError
from toolkit.recipe.evaluate import BUILTIN_METRICS
from toolkit.registry import close_match
from toolkit.user_code import load_function

Metric = Callable[[str, str, Mapping[str, Any]], float]
"""``(prediction, reference, row) -> score``; higher is better, and 1.0 is perfect for the built-in ones."""

SIGNATURE = "def function(prediction: str, reference: str, row: dict) -> float"
PERPLEXITY = "perplexity"
"""The one metric that needs no generated answer; see :mod:`toolkit.evaluation.perplexity`."""


def exact_match(prediction: str, reference: str, row: Mapping[str, Any]) -> float:  # noqa: ARG001
    """1.0 when both are the same text but for white space at the ends."""
    return float(prediction.strip() == reference.strip())


def json_match(prediction: str, reference: str, row: Mapping[str, Any]) -> float:  # noqa: ARG001
    """1.0 when both parse to equal JSON values, whatever the order of keys; 0.0 when the prediction is not JSON.

    Raises:
        DataError: The reference is not JSON.
    """
    try:
        wanted = _strict_json(reference)
    except ValueError as error:
        raise DataError(
            f"json_match needs references in JSON, but one is {_shortened(reference)!r}: {error}",
            "use exact_match or token_f1 for free text",
        ) from error
    try:
        return float(_equal(_strict_json(prediction), wanted))
    except ValueError:
        return 0.0


def contains(prediction: str, reference: str, row: Mapping[str, Any]) -> float:  # noqa: ARG001
    """1.0 when the reference stands somewhere in the prediction."""
    return float(reference.strip() in prediction)


def token_f1(prediction: str, reference: str, row: Mapping[str, Any]) -> float:  # noqa: ARG001
    """Harmonic mean of precision and recall over words, as in SQuAD (arXiv:1606.05250), case and order ignored."""
    ours, theirs = (Counter(text.casefold().split()) for text in (prediction, reference))
    shared = (ours & theirs).total()
    if shared == 0:
        return float(not ours and not theirs)
    return 2 * shared / (ours.total() + theirs.total())


_BUILTIN: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "json_match": json_match,
    "contains": contains,
    "token_f1": token_f1,
}


def load_metric(name: str, recipe_dir: Path) -> Metric:
    """The metric that a recipe names: a built-in one, or ``file.py:function`` relative to the recipe.

    Raises:
        UsageError: No metric has this name, the file or the function does not exist, or the file cannot be imported.
    """
    if name in _BUILTIN:
        return _BUILTIN[name]
    if ":" not in name:
        raise UsageError(
            f"no metric is named {name!r}{close_match(name, BUILTIN_METRICS)}",
            f"known: {', '.join(BUILTIN_METRICS)}, or 'file.py:function' relative to the recipe",
        )
    function = load_function(
        name, recipe_dir, who=f"metric {name}", error=UsageError, signature=SIGNATURE
    )
    return _checked(name, function.call)


def _checked(name: str, function: Callable[..., Any]) -> Metric:
    """The user's function, made to say which row it failed on and to return numbers only."""

    def metric(prediction: str, reference: str, row: Mapping[str, Any]) -> float:
        where = f"metric {name} on row {row.get('id', '?')}"
        try:
            score = function(prediction, reference, dict(row))
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"{where} raised {type(error).__name__}: {error}") from error
        if not isinstance(score, int | float) or math.isnan(score):
            raise DataError(f"{where} returned {score!r}", "return a number; higher is better")
        return float(score)

    return metric


def _strict_json(text: str) -> Any:
    return json.loads(text.strip())


def _equal(one: Any, other: Any) -> bool:
    """Equality of JSON values; unlike Python's, ``true`` is not ``1``."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
