"""Operators that the compiler leaves alone: it neither splits them nor keeps what is inside.

``cost`` says how dear a result is to compute again; it changes nothing here and is read by
``recompute.py``, which decides what is kept for the backward pass.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
_LIBRARY = torch.library.Library("toolkit_speed", "FRAGMENT")

_LIBRARY.define("add_product(Tensor a, Tensor b, Tensor c, Tensor d, int cost) -> Tensor")


def _add_product(a: Tensor, b: Tensor, c: Tensor, d: Tensor, cost: int) -> Tensor:
    out = a @ b
    return out.addmm_(c, d) if c.shape[1] else out


def _add_product_shape(a: Tensor, b: Tensor, c: Tensor, d: Tensor, cost: int) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_LIBRARY.impl("add_product", _add_product, "CompositeExplicitAutograd")
torch.library.register_fake("toolkit_speed::add_product", _add_product_shape, lib=_LIBRARY)
add_product = torch.ops.toolkit_speed.add_product.default
"""``a b + c d`` with ``c d`` added in place: [T, K] [K, N] + [T, R] [R, N]."""


_LIBRARY.define(
    "scaled_add_product(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor c, Tensor d,"
    " bool turn, ScalarType dtype, int cost) -> Tensor"
)


def _scaled_add_product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    c: Tensor,
    d: Tensor,
    turn: bool,
    dtype: torch.dtype,
    cost: int,
) -> Tensor:
    rows = b.t().contiguous() if turn else b
    if a.is_cuda:
        out = torch._scaled_mm(
            a, rows.t(), a_scale[:, None], b_scale[None, :], out_dtype=dtype, use_fast_accum=True
        )
    else:
        out = ((a.float() @ rows.float().t()) * a_scale[:, None] * b_scale).to(dtype)
    return out.addmm_(c, d) if c.shape[1] else out


def _scaled_add_product_shape(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    c: Tensor,
    d: Tensor,
    turn: bool,
    dtype: torch.dtype,
    cost: int,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1] if turn else b.shape[0], dtype=dtype)


_LIBRARY.impl("scaled_add_product", _scaled_add_product, "CompositeExplicitAutograd")
torch.library.register_fake(
    "toolkit_speed::scaled_add_product", _scaled_add_product_shape, lib=_LIBRARY
)
scaled_add_product = torch.ops.toolkit_speed.scaled_add_product.default
"""``(a a_scale) (b b_scale)^T + c d`` over float8: a [T, K], b [N, K], or [K, N] with ``turn``."""
