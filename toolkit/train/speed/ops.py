"""Operators that the compiler leaves alone: it neither splits them nor keeps what is inside.

``cost`` says how dear a result is to compute again; it changes nothing here and is read by
``recompute.py``, which decides what is kept for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("toolkit_speed", "FRAGMENT")


def add_thin(out: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """``out += c d`` in place, [T, N] + [T, R] [R, N]; nothing where R is 0."""
    if not c.shape[1]:
        return out
    if out.is_cuda and out.dtype == torch.bfloat16 and c.shape[1] <= 128:
        from toolkit.train.speed import kernels

        return kernels.add_thin(out, c, d)
    return out.addmm_(c, d)


def turned(matrix: Tensor) -> Tensor:
    """A transposed copy of a matrix of single bytes."""
    if matrix.is_cuda:
        from toolkit.train.speed import kernels

        return kernels.turn(matrix)
    return matrix.t().contiguous()


LIBRARY.define("add_product(Tensor a, Tensor b, Tensor c, Tensor d, int cost) -> Tensor")


def _add_product(a: Tensor, b: Tensor, c: Tensor, d: Tensor, cost: int) -> Tensor:
    return add_thin(a @ b, c, d)


def _add_product_shape(a: Tensor, b: Tensor, c: Tensor, d: Tensor, cost: int) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


LIBRARY.impl("add_product", _add_product, "CompositeExplicitAutograd")
torch.library.register_fake("toolkit_speed::add_product", _add_product_shape, lib=LIBRARY)
add_product = torch.ops.toolkit_speed.add_product.default
"""``a b + c d`` with ``c d`` added in place: [T, K] [K, N] + [T, R] [R, N]."""


LIBRARY.define(
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
    rows = turned(b) if turn else b
    if a.is_cuda:
        out = torch._scaled_mm(
            a, rows.t(), a_scale[:, None], b_scale[None, :], out_dtype=dtype, use_fast_accum=True
        )
    else:
        out = ((a.float() @ rows.float().t()) * a_scale[:, None] * b_scale).to(dtype)
    return add_thin(out, c, d)


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


LIBRARY.impl("scaled_add_product", _scaled_add_product, "CompositeExplicitAutograd")
torch.library.register_fake(
    "toolkit_speed::scaled_add_product", _scaled_add_product_shape, lib=LIBRARY
)
scaled_add_product = torch.ops.toolkit_speed.scaled_add_product.default
"""``(a a_scale) (b b_scale)^T + c d`` over float8: a [T, K], b [N, K], or [K, N] with ``turn``."""
