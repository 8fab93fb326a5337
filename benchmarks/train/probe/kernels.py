"""The toolkit's kernels: each against float64, then its time by tile.

A tile is what the kernels take as ``tile``: rows, columns, warps (and stages); the first of each
list is not special, the one in use is the default of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.train.probe.book import Book, forget, milliseconds
from benchmarks.train.probe.micro import INNER, SHAPE, TOKENS, WIDE, random
from toolkit.train.speed import fp8, gated_kernels, loss_kernel
from toolkit.train.speed.kernels import add_thin
from toolkit.train.speed.loss import entropy_and_gradient

BACKWARD = ((64, 64, 8), (64, 32, 4), (64, 64, 4), (128, 32, 8))
FORWARD = ((64, 64, 4), (64, 64, 8), (64, 32, 4))
QUANTIZE = ((64, 128, 8, 3), (64, 128, 8, 4), (64, 128, 4, 3), (64, 256, 8, 2))
ENTROPY = ((8192, 16), (4096, 8), (16384, 32))
FOR_TILES_S = 45
"""Seconds of the budget, at most: whole steps come after."""


def measure(book: Book) -> None:
    """Errors first: the time of a wrong kernel says nothing."""
    for tokens, inner, rank in ((1000, INNER, 32), (77, 200, 8)):
        _check(
            book,
            f"gated {tokens}x{inner} r{rank}",
            lambda t=tokens, i=inner, r=rank: _block(t, i, r),
        )
    for name, scale, cap in (("entropy", 1.0, 0.0), ("entropy capped", 0.5, 3.0)):
        _check(book, name, lambda s=scale, c=cap: _entropy(s, c))
    until = book.left() - FOR_TILES_S
    _tiles(lambda *taken: book.left() > until and _tile(book, *taken))
    forget()


def _check(book: Book, name: str, errors: Callable[[], dict[str, float]]) -> None:
    book.take(
        "check", name, lambda: {key: float(f"{value:.3g}") for key, value in errors().items()}
    )


def _tile(
    book: Book, name: str, work: Callable[[], Any], moved: float = 0.0, size: tuple[int, ...] = ()
) -> None:
    """``moved``: bytes that must be read and written."""

    def measured() -> dict[str, float]:
        ms = milliseconds(work)
        return {"ms": round(ms, 4), "gbs": round(moved / ms / 1e6, 1)}

    book.take("tile", name, measured, size=size)


def _apart(got: Tensor, wanted: Tensor) -> float:
    """Norm of the error over that of the truth."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def _given(tokens: int, inner: int, rank: int) -> tuple[Tensor, ...]:
    """y, h, b, the scales of y's columns, the gradient of the block's result, c, d."""
    return (
        random(tokens, 2 * inner), random(tokens, rank) / rank**0.5, random(2 * inner, rank),
        torch.rand(2 * inner, device="cuda") + 0.5,
        random(tokens, inner), random(tokens, 16) / 4, random(16, inner),
    )  # fmt: skip


def _block(tokens: int, inner: int, rank: int) -> dict[str, float]:
    """The gated block there and back, and its gradient in FP8, against float64."""
    y, h, b, times, grad, c, d = _given(tokens, inner, rank)
    wide = (y.double() + h.double() @ b.double().t()).requires_grad_()
    gate, up = wide.chunk(2, 1)
    v = torch.nn.functional.silu(gate) * up
    (dy,) = torch.autograd.grad(v, wide, grad.double() + c.double() @ d.double())
    v = v.detach()
    got, most = gated_kernels.gated(y, h, b, True)
    back, again, largest = gated_kernels.gated_backward(grad, c, d, y, h, b, times)
    q, scale, thin = gated_kernels.quantize_thin(back, times, largest, b)
    q2, scale2 = fp8.quantize_rows(back * times)
    return {
        "v": _apart(got, v), "most": _apart(most, got.abs().amax(1)), "again": _apart(again, v),
        "dy": _apart(back, dy), "largest": _apart(largest, (back * times).abs().amax(1)),
        "bytes_apart": float((q.view(torch.uint8) != q2.view(torch.uint8)).double().mean()),
        "scale": _apart(scale, scale2), "thin": _apart(thin, back.double() @ b.double()),
    }  # fmt: skip


def _entropy(scale: float, cap: float) -> dict[str, float]:
    logits = random(300, SHAPE.vocab_size) * 3
    targets = torch.randint(0, SHAPE.vocab_size, (300,), device="cuda")
    loss, slope = entropy_and_gradient(logits.double(), targets, scale, cap)
    got = logits.clone()
    one = loss_kernel.entropy_(got, targets, scale, cap).sum()
    return {"loss": abs(float(one / loss) - 1), "slope": _apart(got, slope)}


def _tiles(tile: Callable[..., Any]) -> None:
    """At three rows of 4,096; ``tile`` takes a name, the work, bytes moved, and the tile."""
    t, k = TOKENS, gated_kernels
    y, h, b, times, grad, c, d = _given(t, INNER, 32)
    for size in BACKWARD:
        for many in (times[:0], times):
            tile(f"backward {len(many) > 0}",
                 lambda m=many, s=size: k.gated_backward(grad, c, d, y, h, b, m, s),
                 12.0 * t * INNER, size)  # fmt: skip
    dy, v, largest = k.gated_backward(grad, c, d, y, h, b, times)
    tile("dy^T h", lambda: dy.t() @ h, 4.0 * t * INNER)
    tile("c^T v", lambda: c.t() @ v, 2.0 * t * INNER)
    for size in FORWARD:
        tile("gated", lambda s=size: k.gated(y, h, b, True, s), 6.0 * t * INNER, size)
    for size in QUANTIZE:
        for n in (t, 4096):
            tile(f"quantize_thin T={n}",
                 lambda n=n, s=size: k.quantize_thin(dy[:n], times, largest[:n], b, s),
                 6.0 * n * INNER, size)  # fmt: skip
    logits = random(1024, SHAPE.vocab_size)
    targets = torch.randint(0, SHAPE.vocab_size, (1024,), device="cuda")
    for size in ENTROPY:
        tile("entropy", lambda s=size: loss_kernel.entropy_(logits, targets, 1.0, 0.0, *s),
             4.0 * 1024 * SHAPE.vocab_size, size)  # fmt: skip
    x, w, thin, d = random(t, WIDE), random(WIDE, WIDE), random(t, 16), random(16, WIDE)
    tile("o: mm + add_thin", lambda: add_thin(x @ w.t(), thin, d))
    tile("o: thin mm + addmm_", lambda: (thin @ d).addmm_(x, w.t()))
    tile("o: mm", lambda: x @ w.t())
