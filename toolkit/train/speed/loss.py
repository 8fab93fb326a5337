"""Output head and cross entropy in one, a piece of the tokens at a time.

The logits of 4,096 tokens over a vocabulary of 128,256 are 1 GB in bf16 and 2 GB in float32. Here
only a piece of them exists at once, and its gradient takes its place; the head is frozen, so the
gradient for the hidden states is finished in the forward pass and backward only scales it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

PIECE = 1024
"""Tokens whose logits exist at once."""


class AfterHead(NamedTuple):
    """What a model does to its logits: ``cap * tanh(logits * scale / cap)``, 0 for no cap."""

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: Any) -> AfterHead:
        """From a model's config: Granite divides, Cohere multiplies, Gemma caps."""
        divided = getattr(config, "logits_scaling", None) or 1.0
        times = getattr(config, "logit_scale", None) or 1.0
        return cls(times / divided, getattr(config, "final_logit_softcapping", None) or 0.0)


def entropy_and_gradient(
    logits: Tensor, targets: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of logits [N, V] as the head gives them, and the gradient for those."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if cap:
        bent = torch.tanh(wide / cap)
        wide = cap * bent
    lse = torch.logsumexp(wide, dim=-1)
    at_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    chosen = torch.where(at_target, wide, 0.0).sum(-1)
    gradient = (torch.exp(wide - lse[:, None]) - at_target.to(wide.dtype)) * scale
    if cap:
        gradient = gradient * (1 - bent * bent)
    return (lse - chosen).sum(), gradient.to(logits.dtype)


def _by_kernel(logits: Tensor, targets: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """The same on a GPU; the gradient takes the logits' place."""
    from toolkit.train.speed.loss_kernel import entropy_

    return entropy_(logits, targets, scale, cap).sum(), logits


class HeadLoss(torch.autograd.Function):  # type: ignore[misc] # torch is not there for mypy
    """Summed cross entropy of ``hidden @ head.T`` [N, V] against ``targets`` [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        after: AfterHead = AfterHead(),  # noqa: B008 - immutable
        piece: int = PIECE,
    ) -> Tensor:
        entropy = _by_kernel if hidden.is_cuda else entropy_and_gradient
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), piece):
            part = slice(start, start + piece)
            loss, of_logits = entropy(hidden[part] @ head.t(), targets[part], *after)
            total += loss
            if gradient is not None:
                torch.mm(of_logits, head, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_total, None, None, None, None
