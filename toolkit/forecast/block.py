"""What one decoder block keeps for its backward pass, bytes by what keeps them. Pure.

Read from ``transformers`` 5.17 (models/llama/modeling_llama.py), ``peft`` 0.21 (tuners/lora/layer.py)
and PyTorch's derivatives.yaml; held to the bytes that are really alive by
tests/integration/in_train/test_forecast_is_true.py.

Letters: T tokens of all sequences of a micro-batch, H hidden, F intermediate, Q all query heads, K
all key heads, R rank, w bytes of an activation (2 in bf16, 4 in fp32).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from toolkit.forecast.shape import ModelShape

Keep = Literal["everything", "products", "but_mlp", "attention", "nothing"]
"""What a block keeps; the rest is computed again in the backward pass. The plain path knows the first and the last."""

READERS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("q_proj", "k_proj", "v_proj"),
    "normed": ("gate_proj", "up_proj"),
    "attended": ("o_proj",),
    "activated": ("down_proj",),
}
"""Input of a block's linear layers -> the layers that read it."""

FLOAT = 4


@dataclass(frozen=True)
class Rows:
    """A micro-batch: B sequences of T tokens."""

    sequences: int
    length: int
    trained: int
    """Tokens that are targets: rows of the logits."""
    apart: bool = False
    """Whether a mask keeps packed rows apart."""

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.sequences * self.length

    @property
    def mask(self) -> int:
        """Elements of a mask [B, 1, T, T], if there is one."""
        return self.sequences * self.length**2 if self.apart else 0


@dataclass(frozen=True)
class Numbers:
    """In which formats a block computes.

    Attributes:
        width: Bytes of an activation.
        targets: Names of the linear layers with an adapter; empty when all weights are trained.
        rank: Of the adapters.
        autocast: Whether fp32 weights are trained that autocast rounds (``full`` in bf16).
        dropout: Whether the adapters' inputs are dropped out.
    """

    width: int = 2
    targets: tuple[str, ...] = ()
    rank: int = 0
    autocast: bool = False
    dropout: bool = False


def kept_plain(shape: ModelShape, rows: Rows, numbers: Numbers) -> int:
    """Bytes that a block of Transformers (with PEFT) keeps when nothing is computed again."""
    per_token = _attention(shape, numbers, masked=rows.apart)
    per_token += _mlp(shape, numbers)
    if numbers.targets:
        per_token += _norms(shape) + _adapters(shape, numbers)
        weights = 0
    else:
        per_token += _full_inputs(shape, numbers)
        weights = numbers.width * shape.block_weights if numbers.autocast else 0
    # a boolean mask becomes one of numbers in every block (convert_boolean_attn_mask)
    return rows.tokens * per_token + numbers.width * rows.mask + weights


def _attention(shape: ModelShape, numbers: Numbers, *, masked: bool) -> int:
    """Rotated queries and keys, values, result, and the softmax's logarithm per head.

    With a mask, keys and values are repeated for every query head (sdpa_attention_forward).
    """
    keys = shape.queries if masked else shape.keys
    heads = shape.queries // shape.head_dim
    kept = numbers.width * (2 * shape.queries + 2 * keys) + FLOAT * heads
    if shape.head_norms:  # fp32 copies of what was projected, and one root per head
        kept += FLOAT * (shape.queries + shape.keys + heads + shape.kv_heads)
        if not numbers.targets:  # and what their trained weights are multiplied with
            kept += (FLOAT if shape.norms > 2 else numbers.width) * (shape.queries + shape.keys)
    return kept


def _mlp(shape: ModelShape, numbers: Numbers) -> int:
    """gate, up and act(gate)."""
    return 3 * numbers.width * shape.intermediate


def _norms(shape: ModelShape) -> int:
    """The fp32 copy of what is normed, and one root per token; the weights are frozen."""
    return shape.norms * (FLOAT * shape.hidden + FLOAT)


def _adapters(shape: ModelShape, numbers: Numbers) -> int:
    """PEFT keeps for every target its input in the adapter's fp32, and x A^T."""
    kept = 0
    for readers in READERS.values():
        present = [
            name for name in readers if has_adapter(name, numbers.targets) and name in shape.linears
        ]
        if not present:
            continue
        inputs = shape.linears[present[0]][1]
        # a cast makes a copy for each; what is fp32 already is one tensor for all, and the attention's
        # result is kept by attention
        copies = len(present) if numbers.width < FLOAT else int("o_proj" not in present)
        copies += len(present) if numbers.dropout else 0
        kept += FLOAT * (copies * inputs + len(present) * numbers.rank)
    return kept


def _full_inputs(shape: ModelShape, numbers: Numbers) -> int:
    """Every weight is trained: inputs of all linear layers, and both sides of the norms' product."""
    norms = shape.norms * (2 * FLOAT * shape.hidden + FLOAT)
    if numbers.autocast:  # five layers read a normed state, and each casts it for itself
        return norms + numbers.width * (5 * shape.hidden + shape.intermediate)
    return norms + numbers.width * (2 * shape.hidden + shape.intermediate)


def kept_fused(shape: ModelShape, rows: Rows, numbers: Numbers, keep: Keep) -> int:
    """Bytes that a block of the fast path keeps (train/speed/recompute.py names what).

    Products are results of linear layers; norms, rotations and act(gate) * up are computed again.
    """
    heads = shape.queries // shape.head_dim
    thin = sum(1 for name in shape.linears if has_adapter(name, numbers.targets)) * numbers.rank
    kept = fused_elements(shape.hidden, shape.intermediate, shape.queries, shape.keys, keep)
    if keep != "nothing":
        kept += thin
    return rows.tokens * (numbers.width * kept + FLOAT * heads)


def fused_elements(hidden: int, inner: int, queries: int, keys: int, keep: Keep) -> int:
    """Elements per token that a block of the fast path keeps, without the thin products of its adapters."""
    found = {"nothing": hidden, "attention": hidden + queries}
    found["but_mlp"] = found["attention"] + queries + 2 * keys + hidden
    found["products"] = found["but_mlp"] + 2 * inner
    found["everything"] = found["products"] + 2 * hidden + queries + keys + inner
    return found[keep]


def has_adapter(name: str, targets: Iterable[str]) -> bool:
    """Whether one of ``targets`` means the linear layer ``name``."""
    return any(target == name or target.endswith(f".{name}") for target in targets)
