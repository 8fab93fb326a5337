"""Batches of preference training, from the stores of the data step: ids go to TRL as they are served.

TRL would render and tokenize rows itself. Its trainers get row numbers instead, and these collators
in place of its own: what they return is what TRL's return, made of the tokens of the dataset.

Legend: B rows, T tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.store import TokenRow, TokenStore
from toolkit.train.batches import rows_with_targets

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

IGNORED = -100
"""Label of a token that no loss reads."""
Example = dict[str, Any]
"""``{"row": number, "heldout": bool}``."""


class Answers:
    """Rows of both sides, the second sequence of each, and what stands in their ``.jsonl``.

    Args:
        dataset: Folder of a dataset artifact.
        second: Name of the second store (``rejected``), if there is one.
    """

    def __init__(self, dataset: Path, second: str | None = None) -> None:
        self._first = {side: TokenStore(dataset / "tokens" / side) for side in ("train", "heldout")}
        self._second = {
            side: TokenStore(dataset / "tokens" / f"{side}-{second}")
            for side in (("train", "heldout") if second else ())
        }

    def first(self, example: Example) -> TokenRow:
        """The sequence that every row has."""
        return self._first[_side(example)][example["row"]]

    def second(self, example: Example) -> TokenRow:
        """The sequence beside it."""
        return self._second[_side(example)][example["row"]]

    def examples(self, side: str) -> list[Example]:
        """Rows of a side that teach something: with an answer, and with both where rows are pairs."""
        rows = rows_with_targets(self._first[side])
        beside = self._second.get(side)
        return [
            {"row": row, "heldout": side == "heldout"}
            for row in rows
            if beside is None or beside[row].trained[1:].any()
        ]


def _side(example: Example) -> str:
    return "heldout" if example["heldout"] else "train"


@dataclass(frozen=True)
class Padded:
    """Sequences laid under each other, padding behind."""

    ids: torch.Tensor  # [B, T]
    attention: torch.Tensor  # [B, T] 1 for a token, 0 for padding
    completion: torch.Tensor  # [B, T] 1 for a token of the answer

    @property
    def labels(self) -> torch.Tensor:
        """[B, T] ids of the answers, :data:`IGNORED` elsewhere."""
        return self.ids.masked_fill(self.completion == 0, IGNORED)


def padded(rows: Sequence[TokenRow], pad_id: int) -> Padded:
    """Lay sequences under each other.

    The first token of a sequence never counts as answer: nothing predicts it.
    """
    import numpy as np
    import torch

    width = max(len(row.ids) for row in rows)
    shape = (len(rows), width)
    ids: NDArray[np.int64] = np.full(shape, pad_id, np.int64)
    attention: NDArray[np.int64] = np.zeros(shape, np.int64)
    completion: NDArray[np.int64] = np.zeros(shape, np.int64)
    for line, row in enumerate(rows):
        length = len(row.ids)
        ids[line, :length] = row.ids
        attention[line, :length] = 1
        completion[line, 1:length] = row.trained[1:]
    return Padded(*map(torch.from_numpy, (ids, attention, completion)))


def _rows_of(examples: Sequence[Example]) -> torch.Tensor:
    import torch

    return torch.tensor([example["row"] for example in examples])


@dataclass(frozen=True)
class PairBatches:
    """Collator of DPO: better answers above, worse ones below."""

    answers: Answers
    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``completion_mask`` [2 B, T], and the row numbers."""
        both = [*map(self.answers.first, examples), *map(self.answers.second, examples)]
        batch = padded(both, self.pad_id)
        return {
            "input_ids": batch.ids,
            "attention_mask": batch.attention,
            "completion_mask": batch.completion,
            "rows": _rows_of(examples),
        }


@dataclass(frozen=True)
class OddsBatches:
    """Collator of ORPO: better and worse answers apart."""

    answers: Answers
    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """``{chosen,rejected}_{input_ids,attention_mask,labels}`` [B, T], and the row numbers."""
        found = {"rows": _rows_of(examples)}
        for name, read in (("chosen", self.answers.first), ("rejected", self.answers.second)):
            batch = padded([read(example) for example in examples], self.pad_id)
            found |= {
                f"{name}_input_ids": batch.ids,
                f"{name}_attention_mask": batch.attention,
                f"{name}_labels": batch.labels,
            }
        return found


@dataclass(frozen=True)
class LabelledBatches:
    """Collator of KTO: answers with their labels, and mismatched ones for the estimate of the KL.

    The mismatched sequence of a row is its question with the answer of the row before it in the
    batch, as in TRL, cut to ``max_length``.
    """

    answers: Answers
    labels: dict[bool, list[bool]]
    """By ``heldout``: the label of every row."""
    pad_id: int
    max_length: int
    mismatched: bool

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``completion_mask`` [B, T], ``label`` [B], ``KL_*``."""
        import torch

        rows = [self.answers.first(example) for example in examples]
        batch = padded(rows, self.pad_id)
        found = {
            "input_ids": batch.ids,
            "attention_mask": batch.attention,
            "completion_mask": batch.completion,
            "label": torch.tensor([self.labels[e["heldout"]][e["row"]] for e in examples]),
            "rows": _rows_of(examples),
        }
        if self.mismatched:
            others = [rows[-1], *rows[:-1]]
            pairs = zip(rows, others, strict=True)
            strange = padded([_mismatch(*pair, self.max_length) for pair in pairs], self.pad_id)
            found |= {
                "KL_input_ids": strange.ids,
                "KL_attention_mask": strange.attention,
                "KL_completion_mask": strange.completion,
            }
        return found


def _mismatch(question: TokenRow, answer: TokenRow, max_length: int) -> TokenRow:
    """The question of one row with the answer of another."""
    import numpy as np

    asked = question.ids[: int(np.argmax(question.trained))]
    given = answer.ids[answer.trained]
    ids = np.concatenate([asked, given])[:max_length]
    return TokenRow(ids, np.arange(len(ids)) >= len(asked))
