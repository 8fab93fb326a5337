"""Triton kernels of a gated feed-forward block; ``gated.py`` says what they are for.

All loads of a program stand before its first product: a barrier lies between products, and no load
is moved over it.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.models.fp8 import LARGEST
from toolkit.train.speed.kernels import launch, thin

FORWARD, BACKWARD = (64, 64, 4), (64, 64, 8)
"""Rows, columns and warps of a program."""
QUANTIZE = (64, 128, 8, 4)
"""The same, and stages."""


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    """To 1e-6; a plain division is most of the instructions of a kernel here."""
    if FAST:
        power = x * -1.4426950408889634
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            ex2.approx.ftz.f32 t, $1;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505 - one of both is compiled
        return tl.sigmoid(x)


@triton.jit
def _factor(pointer, one, other, step, other_step, ones, others):
    """A tile of a thin matrix: [one, other], zeros outside."""
    inside = (one[:, None] < ones) & (other[None, :] < others)
    where = pointer + one[:, None] * step + other[None, :] * other_step
    return tl.load(where, mask=inside, other=0.0)


@triton.jit
def _gated(
    y, h, b, v, largest, rows, inner, ranks, h_row, h_column, b_row, b_column,
    TALL: tl.constexpr, WIDE: tl.constexpr, THIN: tl.constexpr, MOST: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * TALL + tl.arange(0, TALL)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    rank = tl.arange(0, THIN)
    inside = (row[:, None] < rows) & (column[None, :] < inner)
    start = row[:, None].to(tl.int64) * inner + column[None, :]
    twice = row[:, None].to(tl.int64) * (2 * inner) + column[None, :]
    gate = tl.load(y + twice, mask=inside, other=0.0)
    up = tl.load(y + inner + twice, mask=inside, other=0.0)
    left = _factor(h, row, rank, h_row, h_column, rows, ranks)
    gate_b = _factor(b, rank, column, b_column, b_row, ranks, inner)
    up_b = _factor(b + inner * b_row, rank, column, b_column, b_row, ranks, inner)
    gate = gate.to(tl.float32) + tl.dot(left, gate_b)
    up = up.to(tl.float32) + tl.dot(left, up_b)
    value = gate * _sigmoid(gate, FAST) * up
    tl.store(v + start, value.to(v.dtype.element_ty), mask=inside)
    if MOST:
        most = tl.max(tl.abs(value), axis=1)
        tl.atomic_max(largest + row, most, mask=row < rows, sem="relaxed")


def gated(
    y: Tensor, h: Tensor, b: Tensor, most: bool, tile: tuple[int, int, int] = FORWARD
) -> tuple[Tensor, Tensor]:
    """``silu(g) * u`` [T, I] of ``(g, u) = y + h b^T`` [T, 2 I]; its largest by row, if asked for."""
    (rows, inner), (tall, wide, warps) = (y.shape[0], y.shape[1] // 2), tile
    v = y.new_empty(rows, inner)
    largest = y.new_zeros(rows if most else 0, dtype=torch.float32)
    launch(_gated, (triton.cdiv(inner, wide), triton.cdiv(rows, tall)))(
        y, h, b, v, largest, rows, inner, h.shape[1], *h.stride(), *b.stride(),
        TALL=tall, WIDE=wide, THIN=thin(h.shape[1]), MOST=most, FAST=y.is_cuda, num_warps=warps,
    )  # fmt: skip
    return v, largest


@triton.jit
def _gated_backward(
    grad, c, d, y, h, b, times, dy, v, largest, rows, inner, ranks, down_ranks,
    c_row, c_column, d_row, d_column, h_row, h_column, b_row, b_column,
    TALL: tl.constexpr, WIDE: tl.constexpr, THIN: tl.constexpr, DOWN: tl.constexpr,
    MOST: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * TALL + tl.arange(0, TALL)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    rank, down_rank = tl.arange(0, THIN), tl.arange(0, DOWN)
    inside = (row[:, None] < rows) & (column[None, :] < inner)
    start = row[:, None].to(tl.int64) * inner + column[None, :]
    twice = row[:, None].to(tl.int64) * (2 * inner) + column[None, :]
    gate = tl.load(y + twice, mask=inside, other=0.0)
    up = tl.load(y + inner + twice, mask=inside, other=0.0)
    slope = tl.load(grad + start, mask=inside, other=0.0)
    left = _factor(h, row, rank, h_row, h_column, rows, ranks)
    gate_b = _factor(b, rank, column, b_column, b_row, ranks, inner)
    up_b = _factor(b + inner * b_row, rank, column, b_column, b_row, ranks, inner)
    of_down = _factor(c, row, down_rank, c_row, c_column, rows, down_ranks)
    down_a = _factor(d, down_rank, column, d_row, d_column, down_ranks, inner)
    gate = gate.to(tl.float32) + tl.dot(left, gate_b)
    up = up.to(tl.float32) + tl.dot(left, up_b)
    slope = slope.to(tl.float32) + tl.dot(of_down, down_a)
    share = _sigmoid(gate, FAST)
    bent = gate * share
    d_up = slope * bent
    d_gate = slope * up * (share + bent - bent * share)
    tl.store(v + start, (bent * up).to(v.dtype.element_ty), mask=inside)
    tl.store(dy + twice, d_gate.to(dy.dtype.element_ty), mask=inside)
    tl.store(dy + inner + twice, d_up.to(dy.dtype.element_ty), mask=inside)
    if MOST:
        of_gate = tl.load(times + column, mask=column < inner, other=0.0)[None, :]
        of_up = tl.load(times + inner + column, mask=column < inner, other=0.0)[None, :]
        most = tl.max(tl.maximum(tl.abs(d_gate * of_gate), tl.abs(d_up * of_up)), axis=1)
        tl.atomic_max(largest + row, most, mask=row < rows, sem="relaxed")


def gated_backward(
    grad: Tensor, c: Tensor, d: Tensor, y: Tensor, h: Tensor, b: Tensor, times: Tensor,
    tile: tuple[int, int, int] = BACKWARD,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of :func:`gated` [T, 2 I] for ``grad + c d``; and its result once more.

    Where ``times`` [2 I] has elements, also the largest of gradient * times by row.
    """
    (rows, inner), (tall, wide, warps) = grad.shape, tile
    dy, v = torch.empty_like(y), torch.empty_like(grad)
    most = len(times) > 0
    largest = y.new_zeros(rows if most else 0, dtype=torch.float32)
    launch(_gated_backward, (triton.cdiv(inner, wide), triton.cdiv(rows, tall)))(
        grad, c, d, y, h, b, times, dy, v, largest, rows, inner, h.shape[1], c.shape[1],
        *c.stride(), *d.stride(), *h.stride(), *b.stride(),
        TALL=tall, WIDE=wide, THIN=thin(h.shape[1]), DOWN=thin(c.shape[1]), MOST=most,
        FAST=y.is_cuda, num_warps=warps,
        maxnreg=80 if h.shape[1] <= 64 else None,  # three blocks of 8 warps, not two
    )  # fmt: skip
    return dy, v, largest


@triton.jit
def _quantize_thin(
    x, times, largest, b, q, scale, h, rows, ranks, b_row, b_column,
    columns: tl.constexpr, some: tl.constexpr, LIMIT: tl.constexpr, TIMES: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, THIN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    one = tl.maximum(tl.load(largest + row, mask=row < rows, other=0.0), 1e-12) / LIMIT
    if tl.program_id(1) == 0:
        tl.store(scale + row, one, mask=row < rows)
    inverse = (1.0 / one)[:, None]
    rank = tl.arange(0, THIN)
    column = tl.program_id(1) * some + tl.arange(0, WIDE)
    start = row[:, None].to(tl.int64) * columns
    thin = tl.zeros((TALL, THIN), tl.float32)
    for _ in range(0, some, WIDE):
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        value = tl.load(x + start + column[None, :], mask=inside, other=0.0)
        thin += tl.dot(value, _factor(b, column, rank, b_row, b_column, columns, ranks))
        wide = value.to(tl.float32) * inverse
        if TIMES:
            wide = wide * tl.load(times + column, mask=column < columns, other=0.0)[None, :]
        if not FAST:  # the GPU's conversion does so by itself
            wide = tl.clamp(wide, -LIMIT, LIMIT)
        tl.store(q + start + column[None, :], wide.to(q.dtype.element_ty), mask=inside)
        column += WIDE
    inside = (row[:, None] < rows) & (rank[None, :] < ranks)
    where = (tl.program_id(1) * rows + row[:, None]) * ranks + rank[None, :]
    tl.store(h + where, thin, mask=inside)


def quantize_thin(
    x: Tensor, times: Tensor, largest: Tensor, b: Tensor,
    tile: tuple[int, int, int, int] = QUANTIZE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``x * times`` in e4m3 with the scale of each row, and ``x b``, in one pass over ``x``."""
    (rows, columns), ranks, (tall, wide, warps, stages) = x.shape, b.shape[1], tile
    parts = 4 if rows > 8192 else 8  # programs enough for every multiprocessor
    some = triton.cdiv(columns, parts * wide) * wide
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(rows, dtype=torch.float32)
    h = x.new_empty(parts, rows, ranks, dtype=torch.float32)
    launch(_quantize_thin, (triton.cdiv(rows, tall), parts))(
        x, times, largest, b, q, scale, h, rows, ranks, *b.stride(),
        columns=columns, some=some, LIMIT=LARGEST, TIMES=len(times) > 0, TALL=tall, WIDE=wide,
        THIN=thin(ranks), FAST=x.is_cuda, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return q, scale, h.sum(0).to(x.dtype)
