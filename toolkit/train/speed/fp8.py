"""A frozen base in FP8 (e4m3), one scale per output channel; activations one scale per token.

Weights and their scales are those of ``models/fp8.py``, which the FP8 quantizer stores too, so the
served base is the trained base, byte for byte.

The input gradient uses the very same stored bytes: dx = (dy s) Wq, because the scale s belongs to
the axis that is summed, and only ``dy s`` is rounded. Hopper multiplies FP8 only when both operands
are stored along the summed axis, so the gradient needs Wq transposed: a second copy where there is
room, else transposed at each use (7 GB of copying for an 8B, whatever the batch).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.models.fp8 import LARGEST
from toolkit.train.speed.ops import scaled_add_product


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [M, K] -> e4m3 [M, K] and float32 scales [M], x ~ q * scale."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1).clamp(min=1e-12) / LARGEST
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def product(x: Tensor, frozen: Sequence[Tensor], c: Tensor, d: Tensor, cost: int) -> Tensor:
    """``x W^T + c d`` over (weight, scale[, transposed])."""
    return product_of(*quantize_rows(x), frozen, c, d, x.dtype, cost)


def product_of(
    q: Tensor,
    scale: Tensor,
    frozen: Sequence[Tensor],
    c: Tensor,
    d: Tensor,
    dtype: torch.dtype,
    cost: int,
) -> Tensor:
    """The same of rows that are quantized already."""
    return scaled_add_product(q, scale, frozen[0], frozen[1], c, d, False, dtype, cost)


def gradient(dy: Tensor, frozen: Sequence[Tensor], c: Tensor, d: Tensor) -> Tensor:
    """``dy W + c d``."""
    return gradient_of(*quantize_rows(dy * frozen[1]), frozen, c, d, dy.dtype)


def gradient_of(
    q: Tensor, scale: Tensor, frozen: Sequence[Tensor], c: Tensor, d: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same of rows of ``dy * weight's scale`` that are quantized already."""
    twice = len(frozen) > 2  # a transposed copy is there
    stored = frozen[2] if twice else frozen[0]
    one = torch.ones(frozen[0].shape[1], device=q.device)
    return scaled_add_product(q, scale, stored, one, c, d, not twice, dtype, 0)
