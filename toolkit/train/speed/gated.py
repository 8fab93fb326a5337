"""A gated feed-forward block over a frozen base, in as few passes over memory as it needs.

    h = s (x A^T)        (g, u) = x W^T + h B^T        v = silu(g) u        y = v V^T + k D^T

``(g, u)`` are 28,672 numbers a token in a Llama-3.1-8B. What the adapter adds to them, and to the
gradient of ``v``, is added where they are read, never written; silu, product and their gradients
are one pass; over an FP8 base the same pass finds the scale of each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolkit.train.speed import fp8
from toolkit.train.speed.linear import base_gradient, base_product
from toolkit.train.speed.ops import LIBRARY

LIBRARY.define("gated(Tensor y, Tensor h, Tensor b, bool most) -> (Tensor, Tensor)")
LIBRARY.define(
    "gated_backward(Tensor grad, Tensor c, Tensor d, Tensor y, Tensor h, Tensor b, Tensor times)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "quantize_thin(Tensor x, Tensor times, Tensor largest, Tensor b) -> (Tensor, Tensor, Tensor)"
)


def _by_kernel(x: Tensor, *thin: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and all(t.shape[1] <= 128 for t in thin)


def _gated(y: Tensor, h: Tensor, b: Tensor, most: bool) -> tuple[Tensor, Tensor]:
    """``silu(g) u`` of ``(g, u) = y + h b^T``; and its largest by row, if asked for."""
    if _by_kernel(y, h):
        from toolkit.train.speed import gated_kernels as kernels

        return kernels.gated(y, h, b, most)
    gate, up = (y + h @ b.t()).chunk(2, dim=-1)
    v = torch.nn.functional.silu(gate) * up
    return v, v.float().abs().amax(-1) if most else _rows(v, 0)


def _gated_shape(y: Tensor, h: Tensor, b: Tensor, most: bool) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape[0], y.shape[1] // 2), _rows(y, y.shape[0] if most else 0)


def _gated_backward(
    grad: Tensor, c: Tensor, d: Tensor, y: Tensor, h: Tensor, b: Tensor, times: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dy`` for ``grad + c d``; ``dy^T h``, ``c^T v``; the largest of dy * times by row."""
    if _by_kernel(y, h, c):
        from toolkit.train.speed import gated_kernels as kernels

        dy, v, largest = kernels.gated_backward(grad, c, d, y, h, b, times)
        return dy, dy.t() @ h, c.t() @ v, largest
    gate, up = (y + h @ b.t()).chunk(2, dim=-1)
    slope = grad + c @ d
    share = torch.sigmoid(gate)
    bent = gate * share
    dy = torch.cat([slope * up * (share + bent * (1 - share)), slope * bent], dim=-1)
    largest = (dy * times).abs().amax(-1).float() if len(times) else _rows(y, 0)
    return dy, dy.t() @ h, c.t() @ (bent * up), largest


def _gated_backward_shape(
    grad: Tensor, c: Tensor, d: Tensor, y: Tensor, h: Tensor, b: Tensor, times: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _rows(y, y.shape[0] if times.shape[0] else 0)
    return torch.empty_like(y), b.new_empty(b.shape), d.new_empty(d.shape), rows


def _quantize_thin(
    x: Tensor, times: Tensor, largest: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``x * times`` in e4m3 and the scale of each row; ``x b``."""
    if _by_kernel(x, b):
        from toolkit.train.speed import gated_kernels as kernels

        return kernels.quantize_thin(x, times, largest, b)
    return *fp8.quantize_rows(x * times if len(times) else x), x @ b


def _quantize_thin_shape(
    x: Tensor, times: Tensor, largest: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=torch.float8_e4m3fn),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], b.shape[1]),
    )


def _rows(x: Tensor, count: int) -> Tensor:
    return x.new_empty(count, dtype=torch.float32)


for _name, _run, _shape in (
    ("gated", _gated, _gated_shape),
    ("gated_backward", _gated_backward, _gated_backward_shape),
    ("quantize_thin", _quantize_thin, _quantize_thin_shape),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"toolkit_speed::{_name}", _shape, lib=LIBRARY)

gated = torch.ops.toolkit_speed.gated.default
gated_backward = torch.ops.toolkit_speed.gated_backward.default
quantize_thin = torch.ops.toolkit_speed.quantize_thin.default


class GatedProduct(torch.autograd.Function):  # type: ignore[misc] # torch is not there for mypy
    """The block's result for ``x`` [T, H]: [T, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,  # [R, H]
        b: Tensor,  # [2 I, R]
        down_a: Tensor,  # [r, I]
        down_b: Tensor,  # [H, r]
        scales: tuple[float, float],
        kind: str,
        costs: tuple[int, int],
        count: int,  # of tensors that are W, the rest are V
        *stored: Tensor,
    ) -> Tensor:
        frozen, down = stored[:count], stored[count:]
        h = (x @ a.t()) * scales[0]
        y = base_product(kind, x, frozen, *_rank_zero(x, len(b)), costs[0])
        v, largest = gated(y, h, b, kind == "fp8")
        if kind == "fp8":
            q, q_scale, k = quantize_thin(v, largest[:0], largest, down_a.t())
            k = k * scales[1]
            result = fp8.product_of(q, q_scale, down, k, down_b.t(), x.dtype, costs[1])
        else:
            k = (v @ down_a.t()) * scales[1]
            result = base_product(kind, v, down, k, down_b.t(), costs[1])
        ctx.save_for_backward(x, y, h, k, a, b, down_a, down_b, *stored)
        ctx.settings = (scales, kind, count)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, h, k, a, b, down_a, down_b, *rest = ctx.saved_tensors
        scales, kind, count = ctx.settings
        frozen, down = rest[:count], rest[count:]
        dk = (grad @ down_b) * scales[1]
        dv = base_gradient(kind, grad, down, *_rank_zero(grad, down_a.shape[1]))
        times = frozen[1] if kind == "fp8" else dk[0, :0]
        dy, db, d_down_a, largest = gated_backward(dv, dk, down_a, y, h, b, times)
        if kind == "fp8":
            q, q_scale, dh = quantize_thin(dy, times, largest, b)
            dh = dh * scales[0]
            dx = fp8.gradient_of(q, q_scale, frozen, dh, a, x.dtype)
        else:
            dh = (dy @ b) * scales[0]
            dx = base_gradient(kind, dy, frozen, dh, a)
        return (dx, dh.t() @ x, db, d_down_a, grad.t() @ k, *[None] * (4 + len(rest)))


def _rank_zero(rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Factors of an adapter of rank 0."""
    return rows.new_empty(rows.shape[0], 0), rows.new_empty(0, columns)
