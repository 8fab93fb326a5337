"""Rows that a quantizer looks at: training rows as training saw them, mixed with general text that ships."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.recipe.quantize import CalibrationSection

if TYPE_CHECKING:
    from toolkit.data.store import TokenStore

GENERAL_TEXT = Path(__file__).with_name("general_text.jsonl")
"""Short paragraphs and conversations, written for this project: ``{"text"}`` or ``{"messages"}`` a line."""


@dataclass(frozen=True)
class Mix:
    """Which rows calibrate: indices into training rows and general text, and what is left of the latter."""

    training: tuple[int, ...]
    general: tuple[int, ...]
    general_left: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.training) + len(self.general)


def mix(training_rows: int, general_rows: int, section: CalibrationSection, seed: int) -> Mix:
    """Choose rows at random, the same for equal arguments.

    Either side stands in where the other has too few rows; there may still be fewer than ``section.rows`` together.
    """
    wanted_general = round(section.rows * section.general) if training_rows else section.rows
    from_training = min(section.rows - wanted_general, training_rows)
    from_general = min(section.rows - from_training, general_rows)
    from_training = min(section.rows - from_general, training_rows)
    generator = random.Random(seed)  # noqa: S311 - a choice of rows, not a secret
    training = generator.sample(range(training_rows), from_training)
    shuffled = generator.sample(range(general_rows), general_rows)
    return Mix(tuple(training), tuple(shuffled[:from_general]), tuple(shuffled[from_general:]))


def general_text(file: Path = GENERAL_TEXT) -> list[dict[str, Any]]:
    """All rows of the general text."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def token_rows(
    chosen: Mix,
    store: TokenStore | None,
    general: Sequence[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
) -> list[list[int]]:
    """Token ids of the chosen rows: training rows from the token store, general ones by the model's template."""
    training = [store[index].ids.tolist() for index in chosen.training] if store is not None else []
    rows = training + [tokenize(general[index], tokenizer) for index in chosen.general]
    return [row[:max_length] for row in rows]


def tokenize(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of a conversation in the model's template, or of plain text."""
    if "messages" in row:
        rendered = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)
        return list(rendered["input_ids"])
    return list(tokenizer(row["text"])["input_ids"])


def digest(rows: Sequence[Sequence[int]]) -> str:
    """sha256 of the token ids, which is all that calibration sees."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()


def batches(rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """One batch per row: ``{"input_ids": [1, N], "attention_mask": [1, N]}``."""
    import torch

    ids = [torch.tensor([list(row)]) for row in rows]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
