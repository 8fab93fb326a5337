"""The forward pass: cross entropy over trained tokens, and logits for nothing else.

This is the seam for fused kernels: whatever computes :func:`summed_loss` faster replaces it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolkit.train.batches import Batch

if TYPE_CHECKING:
    import torch


@contextmanager
def _head_only_at(model: Any, sources: torch.Tensor) -> Iterator[None]:
    """Show the output head only the hidden states at ``sources`` [N]: logits become [N, V].

    A hook, and not a call of decoder and head by hand, because models do things after the head
    (Gemma caps logits, Granite and Cohere scale them): that is elementwise and goes on working.
    """

    def select(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = args
        return (hidden.flatten(0, 1).index_select(0, sources), *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross entropy summed over the batch's targets, a scalar in float32.

    The sum, not the mean: the caller divides by the trained tokens of the whole optimizer step.
    """
    import torch

    fast = getattr(model, "speed", None)
    if fast is not None:
        loss: torch.Tensor = fast.summed_loss(batch)
        return loss
    device = model.device
    sources = torch.from_numpy(batch.sources).to(device)
    with _head_only_at(model, sources):
        logits = model(
            input_ids=torch.from_numpy(batch.ids).to(device),
            position_ids=torch.from_numpy(batch.positions).to(device),
            use_cache=False,  # with a cache, restarting positions are ignored and packed rows leak
        ).logits  # [N, V]
    targets = torch.from_numpy(batch.targets).to(device)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
