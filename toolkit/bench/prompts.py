"""What the load generator asks: held-out conversations, or words of a wanted number of tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from toolkit.errors import DataError

WORDS = (
    "river", "stone", "market", "winter", "letter", "garden", "engine", "window", "silver",
    "mountain", "bridge", "teacher", "coffee", "paper", "island", "kitchen", "forest", "signal",
    "doctor", "harbor", "pencil", "summer", "castle", "orange", "thunder", "ladder", "mirror",
    "basket",
)  # fmt: skip


def made(count: int, tokens: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Conversations of about ``tokens`` tokens, no two alike, so that a prefix cache does not help.

    A common English word is one token in most vocabularies; the report gives the endpoint's own count.
    """
    source = random.Random(seed)  # noqa: S311 - repeatable, not secret
    texts = [" ".join(source.choices(WORDS, k=max(1, tokens))) for _ in range(count)]
    return [[{"role": "user", "content": text}] for text in texts]


def from_rows(file: Path, count: int) -> list[list[dict[str, Any]]]:
    """The prompts of a dataset's conversations: every turn before the last assistant turn; repeated if too few.

    Raises:
        DataError: The file has no conversation.
    """
    found = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            messages = json.loads(line).get("messages") or []
        except (ValueError, AttributeError):
            raise DataError(f"{file}:{number} is not a JSON object", "give a JSONL file") from None
        prompt = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
        if prompt:
            found.append(prompt)
    if not found:
        raise DataError(f"{file} has no row with messages", "give a dataset's heldout.jsonl")
    return [found[index % len(found)] for index in range(count)]
