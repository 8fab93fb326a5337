"""Single products, the adapters' thin ones, and attention: what the chip gives to each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.train.probe.book import Book, forget, milliseconds
from benchmarks.train.shapes import SHAPES

SHAPE = SHAPES["8b"]
WIDE, INNER, HEADS = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.num_attention_heads
KEYS = WIDE * SHAPE.num_key_value_heads // HEADS
TOKENS = 12288
"""Three rows of 4,096."""
WEIGHTS = {
    "qkv": (WIDE, WIDE + 2 * KEYS),
    "o": (WIDE, WIDE),
    "gate_up": (WIDE, 2 * INNER),
    "down": (INNER, WIDE),
}
"""In and out of the layer's products, with what shares an input merged."""

Made = Callable[[], Callable[[], Any]]


def measure(book: Book) -> None:
    """Every product at three numbers of tokens, then what stands beside them."""
    for tokens in (4096, TOKENS, 20480):
        for name, (k, n) in WEIGHTS.items():
            flop = 2.0 * tokens * k * n
            for way, a, b in (("fwd", k, n), ("dgrad", n, k)):
                _case(book, f"bf16 {way} {name} T={tokens}",
                      partial(_bf16, tokens, a, b, way == "fwd"), flop)  # fmt: skip
                _case(book, f"fp8 row fast {way} {name} T={tokens}",
                      partial(_fp8, tokens, a, b), flop)  # fmt: skip
    _thin(book)
    _attention(book)
    _case(book, "copy 1 GiB", _copy, moved=4.0 * (1 << 29))


def _case(book: Book, name: str, made: Made, flop: float = 0.0, moved: float = 0.0) -> None:
    """``made`` builds the tensors and returns the work; ``moved`` is bytes."""

    def measured() -> dict[str, float]:
        ms = milliseconds(made())
        tflops, gbs = flop / ms / 1e9, moved / ms / 1e6
        return {"ms": round(ms, 4), "tflops": round(tflops, 1), "gbs": round(gbs, 1)}

    book.take("micro", name, measured)
    forget()


def random(*size: int) -> Tensor:
    """Normal, bf16, on the GPU."""
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16)


def _bf16(tokens: int, k: int, n: int, transposed: bool) -> Callable[[], Tensor]:
    a, b = random(tokens, k), random(n, k).t() if transposed else random(k, n)
    return lambda: torch.mm(a, b)


def _fp8(tokens: int, k: int, n: int) -> Callable[[], Tensor]:
    a, b = (random(rows, k).to(torch.float8_e4m3fn) for rows in (tokens, n))
    of_a, of_b = torch.ones(tokens, 1, device="cuda"), torch.ones(1, n, device="cuda")
    return lambda: torch._scaled_mm(
        a, b.t(), of_a, of_b, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _thin(book: Book) -> None:
    """The adapters' products: bound by what they read, not by arithmetic."""
    for name, (k, n) in {
        "x@A 4096->48": (WIDE, 48), "x@A 14336->16": (INNER, 16), "dy@B 28672->32": (2 * INNER, 32),
    }.items():  # fmt: skip
        _case(book, f"thin {name}", partial(_bf16, TOKENS, k, n, True),
              2.0 * TOKENS * k * n, 2.0 * TOKENS * k)  # fmt: skip

    def add(n: int, rank: int) -> Callable[[], Tensor]:
        y, h, b = random(TOKENS, n), random(TOKENS, rank), random(rank, n)
        return lambda: y.addmm_(h, b)

    def tall(n: int, rank: int) -> Callable[[], Tensor]:
        y, h = random(TOKENS, n), random(TOKENS, rank)
        return lambda: y.t() @ h

    for n, rank in ((2 * INNER, 32), (WIDE, 16)):
        _case(book, f"thin y+=hB {n} r{rank}", partial(add, n, rank), moved=4.0 * TOKENS * n)
        _case(book, f"thin dB {n} r{rank}", partial(tall, n, rank), moved=2.0 * TOKENS * n)


def _attention(book: Book) -> None:
    """Three rows, by each backend of PyTorch; then packed rows by its kernel for those."""
    work = 3 * 4.0 * 4096 * 4096 / 2 * WIDE
    for backend in ("default", "cudnn", "flash"):
        for way, flop in (("fwd", work), ("bwd", 2.5 * work)):
            _case(book, f"attention {backend} gqa=True {way} B=3",
                  partial(_sdpa, backend, way == "bwd"), flop)  # fmt: skip
    for way, flop in (("fwd", work), ("bwd", 2.5 * work)):
        _case(book, f"attention packed {way}", partial(_packed, way == "bwd"), flop)


def _either(
    forward: Callable[[], Tensor], inputs: list[Tensor], backward: bool
) -> Callable[[], Any]:
    if not backward:
        return torch.no_grad()(forward)
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _sdpa(backend: str, backward: bool) -> Callable[[], Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    one = {"flash": [SDPBackend.FLASH_ATTENTION], "cudnn": [SDPBackend.CUDNN_ATTENTION]}
    heads = (HEADS, SHAPE.num_key_value_heads, SHAPE.num_key_value_heads)
    inputs = [random(3, 4096, n, WIDE // HEADS).transpose(1, 2).requires_grad_() for n in heads]

    def forward() -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        if backend not in one:
            return attend(*inputs, is_causal=True, enable_gqa=True)
        with sdpa_kernel(one[backend]):
            return attend(*inputs, is_causal=True, enable_gqa=True)

    return _either(forward, inputs, backward)


def _packed(backward: bool) -> Callable[[], Any]:
    from toolkit.train.speed import attention

    heads = (HEADS, SHAPE.num_key_value_heads, SHAPE.num_key_value_heads)
    inputs = [random(TOKENS, n, WIDE // HEADS).requires_grad_() for n in heads]
    bounds = torch.arange(0, TOKENS + 1, 4096, device="cuda", dtype=torch.int32)
    scale = (WIDE // HEADS) ** -0.5
    forward = partial(attention.packed, *inputs, bounds, 4096, scale)
    return _either(forward, inputs, backward)


def _copy() -> Callable[[], Tensor]:
    a, b = random(1 << 29), random(1 << 29)
    return lambda: b.copy_(a)
