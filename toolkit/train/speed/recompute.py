"""What a decoder layer keeps for the backward pass, and what it computes again.

Bytes a token and layer of a Llama-3.1-8B in bf16: input 8 K, q k v 12 K, attention 8 K, o 8 K,
gate and up 56 K, all results of products; norms, rotations and silu(gate) * up, another 60 K, cost
nothing but memory traffic and are always computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from toolkit.forecast.block import Keep
from toolkit.train.speed import attention as _attention  # noqa: F401 - defines an operator
from toolkit.train.speed import gated as _gated  # noqa: F401 - defines operators
from toolkit.train.speed import nf4 as _nf4  # noqa: F401 - defines an operator

COST = {"mlp": 1, "projection": 2}
"""``cost`` of a product: what is dropped first has the lowest."""
_LOWEST = {"products": 1, "but_mlp": 2, "attention": 3, "nothing": 4}
"""The lowest cost that is kept."""

_PRODUCTS = {
    torch.ops.toolkit_speed.add_product.default,
    torch.ops.toolkit_speed.scaled_add_product.default,
    torch.ops.toolkit_speed.nf4_add_product.default,
}
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.toolkit_speed.packed_attention.default,
}
_THIN = {torch.ops.aten.mm.default, torch.ops.toolkit_speed.quantize_thin.default}
"""x A^T: a few bytes a token. Of what the other gives, backward reads only that."""
_KEPT = _ATTENTION | _THIN


def _policy(keep: Keep, _ctx: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # by name: the compiler takes a number that differs between layers for a size that varies
    kept = args[-1] >= _LOWEST[keep] if op in _PRODUCTS else op in _KEPT and keep != "nothing"
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keeping(forward: Callable[..., Any], keep: Keep) -> Callable[..., Any]:
    """``forward`` of a layer, which keeps no more than ``keep`` for its backward pass."""
    if keep == "everything":
        return forward
    # "nothing" by a policy as well: without one the compiler keeps the results of our operators
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, keep))
    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
