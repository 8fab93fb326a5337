"""A frozen base in NF4 as bitsandbytes packs it: unpacked to bf16 right before each product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.train.speed.ops import LIBRARY, add_thin

BLOCK = 64

LIBRARY.define(
    "nf4_add_product(Tensor a, Tensor packed, Tensor absmax, Tensor c, Tensor d,"
    " int outputs, bool turn, int cost) -> Tensor"
)


def unpack(packed: Tensor, absmax: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    """[O, I] in ``dtype`` from packed nibbles [O * I / 2, 1] and float32 absmax [O * I / 64]."""
    shape = [outputs, packed.numel() * 2 // outputs]
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, BLOCK, "nf4", shape, dtype
    )


def _nf4_add_product(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    c: Tensor,
    d: Tensor,
    outputs: int,
    turn: bool,
    cost: int,
) -> Tensor:
    weight = unpack(packed, absmax, outputs, a.dtype)
    out = a @ (weight if turn else weight.t())
    return add_thin(out, c, d)


def _nf4_add_product_shape(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    c: Tensor,
    d: Tensor,
    outputs: int,
    turn: bool,
    cost: int,
) -> Tensor:
    return a.new_empty(a.shape[0], packed.numel() * 2 // outputs if turn else outputs)


LIBRARY.impl("nf4_add_product", _nf4_add_product, "CompositeExplicitAutograd")
torch.library.register_fake("toolkit_speed::nf4_add_product", _nf4_add_product_shape, lib=LIBRARY)
_product = torch.ops.toolkit_speed.nf4_add_product.default


def product(x: Tensor, frozen: Sequence[Tensor], c: Tensor, d: Tensor, cost: int) -> Tensor:
    """``x W^T + c d`` over (packed, absmax)."""
    packed, absmax = frozen
    return _product(x, packed, absmax, c, d, packed.numel() * 2 // x.shape[1], False, cost)


def gradient(dy: Tensor, frozen: Sequence[Tensor], c: Tensor, d: Tensor) -> Tensor:
    """``dy W + c d``."""
    packed, absmax = frozen
    return _product(dy, packed, absmax, c, d, dy.shape[1], True, 0)
