"""Triton kernels of a gated feed-forward block; ``gated.py`` says what they are for."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.train.speed.kernels import adapted, launch, put, thin
from toolkit.train.speed.ops import BACKWARD, FORWARD, SUMS


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
    y: Tensor, h: Tensor, b: Tensor, largest: bool, tile: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """``silu(g) * u`` [T, I] of ``(g, u) = y + h b^T`` [T, 2 I]; its largest by row and tile."""
    (rows, inner), (tall, wide, warps) = (y.shape[0], y.shape[1] // 2), tile or FORWARD
    act = y.new_empty(rows, inner)
    tiles = triton.cdiv(inner, wide)
    most = y.new_empty(rows, tiles if largest else 0, dtype=torch.float32)
    launch(_gated, (tiles, triton.cdiv(rows, tall)))(
        y, h, b, act, most, rows, inner, h.shape[1], *h.stride(), *b.stride(), tiles,
        TALL=tall, WIDE=wide, THIN=thin(h.shape[1]), LARGEST=largest, num_warps=warps,
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
    tile: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`gated` [T, 2 I] for ``grad + c d``; and its result once more.

    Where ``times`` [2 I] has elements, also the largest of gradient * times by row and tile.
    """
    (rows, inner), (tall, wide, warps) = grad.shape, tile or BACKWARD
    dy, act = torch.empty_like(y), torch.empty_like(grad)
    tiles = triton.cdiv(inner, wide)
    largest = len(times) > 0
    most = y.new_empty(rows, tiles if largest else 0, dtype=torch.float32)
    launch(_gated_backward, (tiles, triton.cdiv(rows, tall)))(
        grad, c, d, y, h, b, times, dy, act, most, rows, inner, h.shape[1], c.shape[1],
        *c.stride(), *d.stride(), *h.stride(), *b.stride(), tiles,
        TALL=tall, WIDE=wide, THIN=thin(h.shape[1]), DOWN=thin(c.shape[1]), LARGEST=largest,
        num_warps=warps,
    )  # fmt: skip
    return dy, act, most


@triton.jit
def _gated_sums(
    grad, c, d, y, h, b, times, dy, db, da, largest, rows, inner, ranks, down_ranks,
    c_row, c_column, d_row, d_column, h_row, h_column, b_row, b_column, tiles,
    MANY: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, THIN: tl.constexpr,
    DOWN: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    rank, down_rank = tl.arange(0, THIN), tl.arange(0, DOWN)
    of_gate, of_up = 1.0, 1.0
    if LARGEST:
        of_gate = tl.load(times + column, mask=column < inner, other=0.0)[None, :]
        of_up = tl.load(times + inner + column, mask=column < inner, other=0.0)[None, :]
    known = (rank[:, None] < ranks) & (column[None, :] < inner)
    gate_b = tl.load(b + column[None, :] * b_row + rank[:, None] * b_column, mask=known, other=0.0)
    up_b = tl.load(
        b + (inner + column[None, :]) * b_row + rank[:, None] * b_column, mask=known, other=0.0
    )
    down_a = tl.load(
        d + down_rank[:, None] * d_row + column[None, :] * d_column,
        mask=(down_rank[:, None] < down_ranks) & (column[None, :] < inner), other=0.0,
    )  # fmt: skip
    sum_gate = tl.zeros((WIDE, THIN), tl.float32)
    sum_up = tl.zeros((WIDE, THIN), tl.float32)
    sum_down = tl.zeros((WIDE, DOWN), tl.float32)
    for turn in range(MANY):
        row = (tl.program_id(1) * MANY + turn) * TALL + tl.arange(0, TALL)
        inside = (row[:, None] < rows) & (column[None, :] < inner)
        start = row[:, None].to(tl.int64)
        left = tl.load(
            h + row[:, None] * h_row + rank[None, :] * h_column,
            mask=(row[:, None] < rows) & (rank[None, :] < ranks), other=0.0,
        )  # fmt: skip
        of_down = tl.load(
            c + row[:, None] * c_row + down_rank[None, :] * c_column,
            mask=(row[:, None] < rows) & (down_rank[None, :] < down_ranks), other=0.0,
        )  # fmt: skip
        where = start * (2 * inner) + column[None, :]
        gate = tl.load(y + where, mask=inside, other=0.0).to(tl.float32) + tl.dot(left, gate_b)
        up = tl.load(y + inner + where, mask=inside, other=0.0).to(tl.float32) + tl.dot(left, up_b)
        slope = tl.load(grad + start * inner + column[None, :], mask=inside, other=0.0)
        slope = slope.to(tl.float32) + tl.dot(of_down, down_a)
        share = tl.sigmoid(gate)
        bent = gate * share
        d_gate = (slope * up * (share + bent * (1.0 - share))).to(dy.dtype.element_ty)
        d_up = (slope * bent).to(dy.dtype.element_ty)
        tl.store(dy + where, d_gate, mask=inside)
        tl.store(dy + inner + where, d_up, mask=inside)
        sum_gate += tl.dot(tl.trans(d_gate), left)
        sum_up += tl.dot(tl.trans(d_up), left)
        sum_down += tl.dot(tl.trans((bent * up).to(dy.dtype.element_ty)), of_down)
        if LARGEST:
            most = tl.maximum(
                tl.max(tl.abs(d_gate.to(tl.float32) * of_gate), axis=1),
                tl.max(tl.abs(d_up.to(tl.float32) * of_up), axis=1),
            )
            tl.store(largest + row * tiles + tl.program_id(0), most, mask=row < rows)
    part = tl.program_id(1).to(tl.int64)
    where = column[:, None] * ranks + rank[None, :]
    known = (column[:, None] < inner) & (rank[None, :] < ranks)
    tl.store(db + part * 2 * inner * ranks + where, sum_gate, mask=known)
    tl.store(db + (part * 2 + 1) * inner * ranks + where, sum_up, mask=known)
    where = down_rank[None, :] * inner + column[:, None]
    known = (column[:, None] < inner) & (down_rank[None, :] < down_ranks)
    tl.store(da + part * inner * down_ranks + where, sum_down, mask=known)


def gated_sums(
    grad: Tensor, c: Tensor, d: Tensor, y: Tensor, h: Tensor, b: Tensor, times: Tensor,
    tile: tuple[int, int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient ``dy`` of :func:`gated` for ``grad + c d``, ``dy^T h``, ``c^T v``, and the largest."""
    (rows, inner), (tall, wide, warps, many, stages) = grad.shape, tile or SUMS
    ranks, down_ranks = h.shape[1], c.shape[1]
    dy = torch.empty_like(y)
    tiles, parts = triton.cdiv(inner, wide), triton.cdiv(rows, tall * many)
    db = y.new_empty(parts, 2 * inner, ranks, dtype=torch.float32)
    da = y.new_empty(parts, down_ranks, inner, dtype=torch.float32)
    largest = len(times) > 0
    most = y.new_empty(rows, tiles if largest else 0, dtype=torch.float32)
    launch(_gated_sums, (tiles, parts))(
        grad, c, d, y, h, b, times, dy, db, da, most, rows, inner, ranks, down_ranks,
        *c.stride(), *d.stride(), *h.stride(), *b.stride(), tiles,
        MANY=many, TALL=tall, WIDE=wide, THIN=thin(ranks), DOWN=thin(down_ranks), LARGEST=largest,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dy, db.sum(0).to(b.dtype), da.sum(0).to(d.dtype), most


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
