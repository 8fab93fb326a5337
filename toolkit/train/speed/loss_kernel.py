"""Cross entropy and its gradient in the place of the logits, as a Triton kernel."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.train.speed.kernels import launch


@triton.jit
def _entropy(
    logits, targets, loss, scale, cap,
    columns: tl.constexpr, CAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * columns
    target = tl.load(targets + row)
    most = tl.full((WIDE,), float("-inf"), tl.float32)
    total = tl.zeros((WIDE,), tl.float32)
    for first in range(0, columns, WIDE):
        column = first + tl.arange(0, WIDE)
        value = _bent(start, column, columns, scale, cap, CAP)
        higher = tl.maximum(most, value)
        # a lane that has seen nothing yet has -inf, and -inf - -inf is no number
        known = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - known) + tl.exp(value - known)
        most = higher
    top = tl.max(most, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(most - top), axis=0))
    chosen = tl.sum(_bent(start, target + tl.arange(0, 1), columns, scale, cap, CAP), axis=0)
    tl.store(loss + row, lse - chosen)
    for first in range(0, columns, WIDE):
        column = first + tl.arange(0, WIDE)
        value = _bent(start, column, columns, scale, cap, CAP)
        slope = (tl.exp(value - lse) - (column == target).to(tl.float32)) * scale
        if CAP:
            slope = slope * (1.0 - (value / cap) * (value / cap))
        tl.store(start + column, slope.to(logits.dtype.element_ty), mask=column < columns)


@triton.jit
def _bent(start, column, columns, scale, cap, CAP: tl.constexpr):
    """Logits as the model means them, -inf behind the end."""
    value = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
    value = value * scale
    if CAP:
        e = tl.exp(-2.0 * tl.abs(value / cap))  # tanh without overflow
        bent = cap * (1.0 - e) / (1.0 + e)
        value = tl.where(column < columns, tl.where(value < 0, -bent, bent), float("-inf"))
    return value


def entropy_(
    logits: Tensor, targets: Tensor, scale: float, cap: float, wide: int = 8192, warps: int = 16
) -> Tensor:
    """Cross entropy of each row [N] of logits [N, V], whose gradient takes their place."""
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    launch(_entropy, (len(logits),))(
        logits, targets, loss, scale, cap,
        columns=logits.shape[1], CAP=bool(cap), WIDE=wide, num_warps=warps,
    )  # fmt: skip
    return loss
