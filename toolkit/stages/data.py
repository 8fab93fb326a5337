"""``data``: rows of any format become conversations, tokens, a loss mask and a ledger."""

from __future__ import annotations

from typing import ClassVar

from toolkit.recipe.base import Section
from toolkit.recipe.data import DataSection
from toolkit.stages import Kind, StageContext, StageResult


class DataConfig(Section):
    """What decides the bytes of the dataset."""

    data: DataSection
    max_length: int
    seed: int
    digests: dict[str, str] = {}
    """sha256 of every local file that is read, by the path the recipe gives."""


class Data:
    """Input ``model`` (its tokenizer). Writes ``train.jsonl, heldout.jsonl, tokens/{train,heldout}/, ledger.json``."""

    name: ClassVar[str] = "data"
    produces: ClassVar[Kind] = Kind.dataset
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "train"

    def run(self, config: DataConfig, ctx: StageContext) -> StageResult:
        """Read, normalise, split, render and tokenize."""
        raise NotImplementedError
