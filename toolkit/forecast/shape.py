"""Sizes of a decoder: all that the forecasts need to know of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Linears = Mapping[str, tuple[int, int]]
"""Name of a layer's linear layer -> (outputs, inputs)."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder of the kind that Llama is."""

    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    linears: Linears = field(default_factory=dict)
    """The linear layers of one block."""
    heads: int = 0
    tied: bool = False
    """Whether the output head is the embedding."""
    norms: int = 2
    """Norms of the hidden state in a block: 2, or 4 where outputs are normed too (Gemma 2 and 3)."""
    head_norms: bool = False
    """Whether queries and keys are normed head by head (Qwen 3, Gemma 3)."""
    capped: bool = False
    """Whether logits are capped by a tanh (Gemma 2)."""
    known: bool = True
    """Whether its kind is one that the formulas were checked against."""

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return (self.heads or self.hidden // self.head_dim) * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token; values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def block_weights(self) -> int:
        """Weights in the linear layers of one block."""
        return sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def linear_weights(self) -> int:
        """Weights in the linear layers of all blocks."""
        return self.layers * self.block_weights

    @property
    def embedding_weights(self) -> int:
        """Weights of one embedding; the output head has as many."""
        return self.vocabulary * self.hidden

    @property
    def other_weights(self) -> int:
        """Embedding, output head and norms: what a quantized base keeps in bf16."""
        tables = self.embedding_weights * (1 if self.tied else 2)
        return tables + (self.layers * self.norms + 1) * self.hidden

    @property
    def weights(self) -> int:
        """All weights."""
        return self.linear_weights + self.other_weights
