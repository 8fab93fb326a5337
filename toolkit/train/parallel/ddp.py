"""Distributed data parallel: every rank holds everything; gradients are averaged while they appear."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from toolkit.train.batches import Batch
from toolkit.train.model import Numerics, trainable
from toolkit.train.parallel.engine import Engine

if TYPE_CHECKING:
    import torch


class DataParallel(Engine):
    """``torch.nn.parallel.DistributedDataParallel``."""

    name: ClassVar[str] = "ddp"

    def wrap(self, root: Any, numerics: Numerics) -> Any:
        """Send only the trainable weights: the frozen ones were read from the same files."""
        del numerics
        import torch
        import torch.distributed as dist

        for _, weight in trainable(self.model):
            dist.broadcast(weight.data, 0)
        return torch.nn.parallel.DistributedDataParallel(
            root, **_unsent_buffers(), init_sync=False, gradient_as_bucket_view=True
        )

    def gradients(self, batch: Batch, scale: float, *, last: bool) -> torch.Tensor:
        """Gradients stay here until the last pass, and are sent while that one is computed."""
        with nullcontext() if last else self.wrapped.no_sync():
            return super().gradients(batch, scale, last=last)


def _unsent_buffers() -> dict[str, bool]:
    """Buffers (of rotary embeddings) are alike everywhere: never sent. torch 2.13 renamed the option."""
    import inspect

    import torch

    known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    return {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
