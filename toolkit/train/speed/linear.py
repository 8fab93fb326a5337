"""A LoRA linear layer over a frozen base that moves no byte it need not.

    y  = x W^T + h B^T        h  = s (x A^T)
    dx = dy W  + dh A         dh = s (dy B),  dA = dh^T x,  dB = dy^T h

T tokens, I inputs, O outputs, R ranks. Both lines are one primitive, ``a b + c d`` with a thin
``c``: the base product is written once and the adapter is added in place. Layers that read the same
input (q, k, v; gate, up) are one :class:`Group`: one base product, A stacked, B block-diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.train.speed import fp8, nf4
from toolkit.train.speed.ops import add_product


def base_product(
    kind: str, x: Tensor, frozen: Sequence[Tensor], c: Tensor, d: Tensor, cost: int
) -> Tensor:
    """``x W^T + c d``, [T, O], over a base stored as ``kind``."""
    if kind == "fp8":
        return fp8.product(x, frozen, c, d, cost)
    if kind == "nf4":
        return nf4.product(x, frozen, c, d, cost)
    return add_product(x, frozen[0].t(), c, d, cost)


def base_gradient(kind: str, dy: Tensor, frozen: Sequence[Tensor], c: Tensor, d: Tensor) -> Tensor:
    """``dy W + c d``, [T, I]."""
    if kind == "fp8":
        return fp8.gradient(dy, frozen, c, d)
    if kind == "nf4":
        return nf4.gradient(dy, frozen, c, d)
    return add_product(dy, frozen[0], c, d, 0)


class LoraProduct(torch.autograd.Function):  # type: ignore[misc] # torch is not there for mypy
    """``x W^T + s (z A^T) B^T``; ``z`` is ``x``, or ``x`` after dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [T, I]
        z: Tensor | None,  # [T, I], or None where nothing is dropped
        a: Tensor,  # [R, I]
        b: Tensor,  # [O, R]
        scale: float,
        kind: str,
        cost: int,
        *frozen: Tensor,
    ) -> Tensor:
        seen = x if z is None else z
        h = (seen @ a.t()) * scale
        ctx.save_for_backward(seen, h, a, b, *frozen)
        ctx.settings = (scale, kind, z is not None)
        return base_product(kind, x, frozen, h, b.t(), cost)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seen, h, a, b, *frozen = ctx.saved_tensors
        scale, kind, dropped = ctx.settings
        dh = (dy @ b) * scale
        da = dh.t() @ seen
        db = dy.t() @ h
        dz = None
        if dropped:
            dz = dh @ a
            dh, a = dh[:, :0], a[:0]
        dx = base_gradient(kind, dy, frozen, dh, a)
        return (dx, dz, da, db, None, None, None, *([None] * len(frozen)))
