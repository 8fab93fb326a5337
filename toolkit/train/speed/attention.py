"""Attention among packed rows without a mask: cumulative lengths, and no work across rows.

Under the name :data:`NAME` Transformers calls :func:`attend` in place of its own. Where a batch has
no packed rows it is PyTorch's scaled-dot-product attention, causal, which picks the kernel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.train.speed.ops import LIBRARY

NAME = "toolkit_packed"


def attend(
    module: Any,
    query: Tensor,  # [B, heads, T, D]
    key: Tensor,  # [B, kv_heads, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,  # [rows + 1] int32
    max_length_q: int | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """Causal attention: [B, T, heads, D]."""
    if cu_seq_lens_q is None:
        shared = query.shape[1] != key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=shared
        )
        return out.transpose(1, 2), None
    q, k, v = (part.transpose(1, 2)[0] for part in (query, key, value))  # [T, heads, D]
    out = packed(q, k, v, cu_seq_lens_q, int(max_length_q or 0), scaling or q.shape[-1] ** -0.5)
    return out[None], None


def register() -> str:
    """Make the name known to Transformers, with no mask of its own; return it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)
    return NAME


def row_bounds(positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """Where rows begin in [B, T] laid flat, with the end, and the length of the longest.

    The bounds are padded with empty rows to a power of two, so that few shapes are compiled.
    """
    flat = positions.ravel()
    starts = np.flatnonzero(flat == 0)
    bounds: NDArray[np.int64] = np.append(starts, len(flat))
    longest = int(np.diff(bounds).max())
    room = 1 << max(4, len(bounds).bit_length())
    padded: NDArray[np.int32] = np.full(room, len(flat), np.int32)
    padded[: len(bounds)] = bounds
    return padded, longest


LIBRARY.define(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, SymInt longest, float scale)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor bounds, SymInt longest, float scale) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    if not q.is_cuda:
        return _plain(q, k, v, bounds, scale)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return out, lse


def _plain(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same by rows, for any device, in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    for part, scores in _scores(q, k, bounds, scale):
        lse[:, part] = torch.logsumexp(scores, -1)
        values = _per_query(v[part], q).to(wide)
        out[part] = (torch.softmax(scores, -1) @ values).transpose(0, 1).to(q.dtype)
    return out, lse


def _per_query(x: Tensor, q: Tensor) -> Tensor:
    """[t, kv_heads, D] -> [heads, t, D], each key-value head for its queries."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, bounds: Tensor, scale: float) -> Any:
    edges = bounds.tolist()
    for start, end in pairwise(edges):
        if end == start:
            continue
        part = slice(start, end)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q[part].transpose(0, 1).to(wide) @ _per_query(k[part], q).to(wide).mT * scale
        ahead = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        yield part, scores.masked_fill(ahead, float("-inf"))


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.is_cuda:
        return _plain_backward(grad, q, k, v, bounds, scale)
    no_dropout = (
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.empty(0, device=q.device),
    )
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, True, *no_dropout,
        scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        pieces = []
        for part, scores in _scores(inputs[0], inputs[1], bounds, scale):
            values = _per_query(inputs[2][part], q).to(scores.dtype)
            pieces.append((torch.softmax(scores, -1) @ values).transpose(0, 1).to(q.dtype))
        dq, dk, dv = torch.autograd.grad(torch.cat(pieces), inputs, grad)
    return dq, dk, dv


def _forward_shape(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


def _backward_shape(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


LIBRARY.impl("packed_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("packed_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("toolkit_speed::packed_attention", _forward_shape, lib=LIBRARY)
torch.library.register_fake(
    "toolkit_speed::packed_attention_backward", _backward_shape, lib=LIBRARY
)


class _Packed(torch.autograd.Function):  # type: ignore[misc] # torch is not there when types are checked
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float
    ) -> Tensor:
        out, lse = torch.ops.toolkit_speed.packed_attention.default(q, k, v, bounds, longest, scale)
        ctx.save_for_backward(q, k, v, out, lse, bounds)
        ctx.settings = (longest, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, bounds = ctx.saved_tensors
        longest, scale = ctx.settings
        dq, dk, dv = torch.ops.toolkit_speed.packed_attention_backward.default(
            grad, q, k, v, out, lse, bounds, longest, scale
        )
        return dq, dk, dv, None, None, None


def packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """Causal attention within rows: [T, heads, D] from q and from k, v [T, kv_heads, D].

    Args:
        q: Queries of all rows, one behind the other.
        k: Keys.
        v: Values.
        bounds: Where rows begin, and the end [rows + 1], int32; empty rows may follow.
        longest: Tokens of the longest row, or more.
        scale: Of the scores.
    """
    result: Tensor = _Packed.apply(q, k, v, bounds, longest, scale)
    return result
