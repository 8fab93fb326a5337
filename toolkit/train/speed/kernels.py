"""Small Triton kernels for what PyTorch does at half of the memory's speed or less.

Measured on an H200 (copy 4.2 TB/s): ``addmm_`` with a thin factor reached 2.2 TB/s, a transposed
copy of bytes 0.32 TB/s, the compiler's silu(gate) * up backward 2.0 TB/s, its cross entropy 1.3.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def adapted(
    base, step, c, c_row, c_column, d, d_row, d_column, row, column, rows, columns, ranks,
    THIN: tl.constexpr,
):  # fmt: skip
    """A tile of ``base + c d`` in float32."""
    rank = tl.arange(0, THIN)
    left = tl.load(
        c + row[:, None] * c_row + rank[None, :] * c_column,
        mask=(row[:, None] < rows) & (rank[None, :] < ranks), other=0.0,
    )  # fmt: skip
    right = tl.load(
        d + rank[:, None] * d_row + column[None, :] * d_column,
        mask=(rank[:, None] < ranks) & (column[None, :] < columns), other=0.0,
    )  # fmt: skip
    where = base + row[:, None].to(tl.int64) * step + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    return tl.load(where, mask=inside, other=0.0).to(tl.float32) + tl.dot(left, right)


@triton.jit
def put(target, step, row, column, rows, columns, tile):
    """Write a tile where it belongs."""
    where = target + row[:, None].to(tl.int64) * step + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(where, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _add_thin(
    out, c, d, rows, columns, ranks, step, c_row, c_column, d_row, d_column,
    TALL: tl.constexpr, WIDE: tl.constexpr, THIN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * TALL + tl.arange(0, TALL)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    tile = adapted(
        out, step, c, c_row, c_column, d, d_row, d_column, row, column, rows, columns, ranks, THIN
    )
    put(out, step, row, column, rows, columns, tile)


def add_thin(out: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """``out += c d`` in place: [T, N], [T, R] with R up to 128, [R, N]."""
    (rows, columns), ranks = out.shape, c.shape[1]
    tall, wide = 64, 128
    grid = (triton.cdiv(columns, wide), triton.cdiv(rows, tall))
    launch(_add_thin, grid)(
        out, c, d, rows, columns, ranks, out.stride(0), *c.stride(), *d.stride(),
        TALL=tall, WIDE=wide, THIN=thin(ranks), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _turn(source, target, rows, columns, TALL: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(1) * TALL + tl.arange(0, TALL)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    tile = tl.load(
        source + row[:, None] * columns + column[None, :],
        mask=(row[:, None] < rows) & (column[None, :] < columns), other=0,
    )  # fmt: skip
    tl.store(
        target + column[:, None] * rows + row[None, :],
        tl.trans(tile), mask=(column[:, None] < columns) & (row[None, :] < rows),
    )  # fmt: skip


def turn(matrix: Tensor) -> Tensor:
    """A transposed copy of a matrix of single bytes, e.g. float8."""
    rows, columns = matrix.shape
    target = torch.empty(columns, rows, dtype=matrix.dtype, device=matrix.device)
    grid = (triton.cdiv(columns, 128), triton.cdiv(rows, 128))
    launch(_turn, grid)(
        matrix.view(torch.uint8), target.view(torch.uint8), rows, columns, TALL=128, WIDE=128, num_warps=8
    )  # fmt: skip
    return target


def thin(ranks: int) -> int:
    """A width that matrix units take."""
    return int(max(16, triton.next_power_of_2(ranks)))


def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    """The kernel over a grid, as a name that types can be given to."""
    return kernel[grid]
