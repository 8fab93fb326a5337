"""Triton kernels of a gated feed-forward block; ``gated.py`` says what they are for."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.train.speed.kernels import adapted, launch, put, thin
from toolkit.train.speed.ops import BACKWARD, FORWARD


@triton.jit
def _gated(
    y, h, b, act, largest, rows, inner, ranks, h_row, h_column, b_row, b_column, tiles,
    TALL: tl.constexpr, WIDE: tl.constexpr, THIN: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * TALL + tl.arange(0, TALL)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    gate = adapted(
        y, 2 * inner, h, h_row, h_column, b, b_column, b_row, row, column, rows, inner, ranks, THIN
    )
    up = adapted(
        y + inner, 2 * inner, h, h_row, h_column, b + inner * b_row, b_column, b_row,
        row, column, rows, inner, ranks, THIN,
    )  # fmt: skip
    value = (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty)
    put(act, inner, row, column, rows, inner, value)
    if LARGEST:
        most = tl.max(tl.abs(value.to(tl.float32)), axis=1)
        tl.store(largest + row * tiles + tl.program_id(0), most, mask=row < rows)


def gated(
    y: Tensor, h: Tensor, b: Tensor, largest: bool, tile: tuple[int, int, int] = FORWARD
) -> tuple[Tensor, Tensor]:
    """``silu(g) * u`` [T, I] of ``(g, u) = y + h b^T`` [T, 2 I]; its largest by row and tile."""
    (rows, inner), tall, wide = (y.shape[0], y.shape[1] // 2), *tile[:2]
    act = y.new_empty(rows, inner)
    tiles = triton.cdiv(inner, wide)
    most = y.new_empty(rows, tiles if largest else 0, dtype=torch.float32)
    launch(_gated, (tiles, triton.cdiv(rows, tall)))(
        y, h, b, act, most, rows, inner, h.shape[1], *h.stride(), *b.stride(), tiles,
        TALL=tall, WIDE=wide, THIN=thin(h.shape[1]), LARGEST=largest, num_warps=tile[2],
    )  # fmt: skip
    return act, most


@triton.jit
def _gated_backward(
    grad, c, d, y, h, b, times, dy, act, largest, rows, inner, ranks, down_ranks,
    c_row, c_column, d_row, d_column, h_row, h_column, b_row, b_column, tiles,
    TALL: tl.constexpr, WIDE: tl.constexpr, THIN: tl.constexpr, DOWN: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * TALL + tl.arange(0, TALL)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    gate = adapted(
        y, 2 * inner, h, h_row, h_column, b, b_column, b_row, row, column, rows, inner, ranks, THIN
    )
    up = adapted(
        y + inner, 2 * inner, h, h_row, h_column, b + inner * b_row, b_column, b_row,
        row, column, rows, inner, ranks, THIN,
    )  # fmt: skip
    slope = adapted(
        grad, inner, c, c_row, c_column, d, d_row, d_column,
        row, column, rows, inner, down_ranks, DOWN,
    )  # fmt: skip
    share = tl.sigmoid(gate)
    bent = gate * share
    put(act, inner, row, column, rows, inner, bent * up)
    d_gate = (slope * up * (share + bent * (1.0 - share))).to(dy.dtype.element_ty)
    d_up = (slope * bent).to(dy.dtype.element_ty)
    put(dy, 2 * inner, row, column, rows, inner, d_gate)
    put(dy + inner, 2 * inner, row, column, rows, inner, d_up)
    if LARGEST:
        of_gate = tl.load(times + column, mask=column < inner, other=0.0)
        of_up = tl.load(times + inner + column, mask=column < inner, other=0.0)
        most = tl.maximum(
            tl.max(tl.abs(d_gate.to(tl.float32) * of_gate[None, :]), axis=1),
            tl.max(tl.abs(d_up.to(tl.float32) * of_up[None, :]), axis=1),
        )
        tl.store(largest + row * tiles + tl.program_id(0), most, mask=row < rows)


def gated_backward(
    grad: Tensor,
    c: Tensor,
    d: Tensor,
    y: Tensor,
    h: Tensor,
    b: Tensor,
    times: Tensor,
    tile: tuple[int, int, int] = BACKWARD,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`gated` [T, 2 I] for ``grad + c d``; and its result once more.

    Where ``times`` [2 I] has elements, also the largest of gradient * times by row and tile.
    """
    (rows, inner), tall, wide = grad.shape, *tile[:2]
    dy, act = torch.empty_like(y), torch.empty_like(grad)
    tiles = triton.cdiv(inner, wide)
    largest = len(times) > 0
    most = y.new_empty(rows, tiles if largest else 0, dtype=torch.float32)
    launch(_gated_backward, (tiles, triton.cdiv(rows, tall)))(
        grad, c, d, y, h, b, times, dy, act, most, rows, inner, h.shape[1], c.shape[1],
        *c.stride(), *d.stride(), *h.stride(), *b.stride(), tiles,
        TALL=tall, WIDE=wide, THIN=thin(h.shape[1]), DOWN=thin(c.shape[1]), LARGEST=largest,
        num_warps=tile[2],
    )  # fmt: skip
    return dy, act, most


@triton.jit
def _quantize_thin(
    x, times, largest, b, q, scale, h, rows, ranks, tiles, b_row, b_column,
    columns: tl.constexpr, TIMES: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr,
    THIN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    tile = tl.arange(0, TILES)
    seen = tl.load(
        largest + row[:, None] * tiles + tile[None, :],
        mask=(row[:, None] < rows) & (tile[None, :] < tiles), other=0.0,
    )  # fmt: skip
    one = tl.maximum(tl.max(seen, axis=1), 1e-12) / 448.0
    tl.store(scale + row, one, mask=row < rows)
    rank = tl.arange(0, THIN)
    start = row[:, None].to(tl.int64) * columns
    thin = tl.zeros((TALL, THIN), tl.float32)
    for first in range(0, columns, WIDE):
        column = first + tl.arange(0, WIDE)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        value = tl.load(x + start + column[None, :], mask=inside, other=0.0)
        right = tl.load(
            b + column[:, None] * b_row + rank[None, :] * b_column,
            mask=(column[:, None] < columns) & (rank[None, :] < ranks), other=0.0,
        )  # fmt: skip
        thin += tl.dot(value, right)
        wide = value.to(tl.float32)
        if TIMES:
            wide = wide * tl.load(times + column, mask=column < columns, other=0.0)[None, :]
        wide = tl.clamp(wide / one[:, None], -448.0, 448.0)
        tl.store(q + start + column[None, :], wide.to(q.dtype.element_ty), mask=inside)
    where = h + row[:, None] * ranks + rank[None, :]
    inside = (row[:, None] < rows) & (rank[None, :] < ranks)
    tl.store(where, thin.to(h.dtype.element_ty), mask=inside)


def quantize_thin(
    x: Tensor,
    times: Tensor,
    largest: Tensor,
    b: Tensor,
    tile: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x * times`` in e4m3 with the scale of each row, and ``x b``, in one pass over ``x``."""
    (rows, columns), ranks, tiles = x.shape, b.shape[1], largest.shape[1]
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(rows, dtype=torch.float32)
    h = x.new_empty(rows, ranks)
    tall, wide, warps, stages = tile or (32 if rows >= 8192 else 16, 128, 4, 4)
    launch(_quantize_thin, (triton.cdiv(rows, tall),))(
        x, times, largest, b, q, scale, h, rows, ranks, tiles, *b.stride(),
        columns=columns, TIMES=len(times) > 0, TALL=tall, WIDE=wide, TILES=triton.next_power_of_2(tiles),
        THIN=thin(ranks), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return q, scale, h
