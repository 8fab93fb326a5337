"""Counts the bytes of tensors that are alive, storage by storage, while a model takes a step."""

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toolkit.train.batches import Batch
from toolkit.train.loss import summed_loss


class LiveBytes(TorchDispatchMode):
    """``now`` and ``peak`` bytes of all that operators returned since it was entered."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Seen:
    """Bytes beyond the weights."""

    kept: int  # after the loss, before the backward pass
    peak: int
    gradients: int


def measure(model, sequences, length, trained, *, packed=False) -> Seen:
    """One forward and backward pass over zeros."""
    ends = [length // 2, length - length // 2] if packed else [length]
    line = np.concatenate([np.arange(end) for end in ends])
    batch = Batch(
        np.zeros((sequences, length), np.int64),
        np.tile(line, (sequences, 1)),
        np.arange(trained, dtype=np.int64),
        np.zeros(trained, np.int64),
        sequences * length,
        tuple(range(sequences)),
    )
    weights = [*model.parameters(), *model.buffers()]
    with LiveBytes(weights) as live:
        loss = summed_loss(model, batch) / trained
        kept = live.now
        loss.backward()
    gradients = sum(w.grad.nbytes for w in weights if getattr(w, "grad", None) is not None)
    for weight in weights:
        weight.grad = None
    return Seen(kept, live.peak, gradients)
