"""Rewards of the GRPO recipe: is the number right, and is it written where it was asked for?

A reward gets the answers of a batch (``completions``) and, by name, what else it takes: the
questions (``prompts``), the answers that rows bring (``references``), any other column of the rows.
It returns one number for every answer. The last function is the same judgement as a metric.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

FINAL = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


def number_of(text: str | None) -> float | None:
    """The number behind the last ``####``; None where there is none."""
    found = FINAL.findall(text or "")
    return float(found[-1].replace(",", "")) if found else None


def right_number(completions: Sequence[str], references: Sequence[str | None]) -> list[float]:
    """1 for an answer that ends with the number of its reference, else 0."""
    pairs = zip(completions, references, strict=True)
    return [same_number(answer, reference or "", {}) for answer, reference in pairs]


def ends_with_number(completions: Sequence[str]) -> list[float]:
    """1 for an answer whose last line is ``#### NUMBER``, else 0."""
    return [
        float(bool(FINAL.fullmatch(text.strip().rpartition("\n")[2].strip())))
        for text in completions
    ]


def same_number(prediction: str, reference: str, row: Mapping[str, object]) -> float:  # noqa: ARG001
    """1.0 when both end with the same number."""
    given, wanted = number_of(prediction), number_of(reference)
    return float(wanted is not None and given == wanted)
