"""The loss on held-out rows, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.data.store import TokenStore
from toolkit.train.batches import collate
from toolkit.train.loss import summed_loss
from toolkit.train.order import MicroBatch
from toolkit.train.parallel.engine import Engine
from toolkit.train.parallel.share import share


def heldout_loss(engine: Engine, store: TokenStore, batches: Sequence[MicroBatch]) -> float:
    """Loss averaged over all trained tokens of ``batches``, without gradients or dropout."""
    ranks = engine.ranks
    loss, tokens = 0.0, 0
    with engine.scoring():
        for turn in share(batches, ranks.rank, ranks.count):
            batch = collate(store, turn.sequences)
            summed = float(engine.call(summed_loss, batch))
            if not turn.idle:
                loss += summed
                tokens += batch.trained_tokens
    loss, all_tokens = ranks.total(loss, tokens)
    return loss / all_tokens
