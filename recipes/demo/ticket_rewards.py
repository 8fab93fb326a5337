"""Rewards of the demo's GRPO recipe: how right is a ticket, and can it be read at all?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def right_fields(completions: Sequence[str], references: Sequence[str | None]) -> list[float]:
    """Share of the right ticket's fields that an answer has right; 0 for what is no ticket."""
    return [
        _share(_ticket(answer), _ticket(reference or ""))
        for answer, reference in zip(completions, references, strict=True)
    ]


def is_json(completions: Sequence[str]) -> list[float]:
    """1 for an answer that is a JSON object, else 0."""
    return [float(bool(_ticket(answer))) for answer in completions]


def _ticket(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _share(answer: dict[str, Any], right: dict[str, Any]) -> float:
    if not right or not answer:
        return 0.0
    return sum(answer.get(key) == value for key, value in right.items()) / len(right)
