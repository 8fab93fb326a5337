"""An adapter must act: one that trains and does nothing is the most silent failure."""

from __future__ import annotations

from typing import Any

from toolkit.data.store import TokenRow
from toolkit.errors import StepFailedError
from toolkit.train.parallel.engine import Engine

LONGEST = 512
"""Tokens of the row that are looked at."""


def row_logits(model: Any, row: TokenRow) -> Any:
    """Logits [tokens, vocabulary] of one row in float32, on the CPU."""
    import numpy as np
    import torch

    ids = torch.from_numpy(np.array(row.ids[:LONGEST], np.int64))[None].to(model.device)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def adapter_effect(engine: Engine, row: TokenRow) -> float:
    """Largest difference that the adapter makes to a logit of ``row``; all ranks call.

    Raises:
        StepFailedError: The adapter is all zero, or changes no logit.
    """
    products = [bool(weight.any()) for name, weight in engine.weights() if "lora_B" in name]
    if not any(products):
        raise StepFailedError(
            f"training left all {len(products)} adapter matrices B at zero: it does nothing",
            "look at the learning rate, the number of steps and the loss in metrics.jsonl",
        )
    with engine.scoring():
        adapted = engine.call(row_logits, row)
        plain = engine.call(_without_adapter, row)
    effect = float((adapted - plain).abs().max())
    if effect == 0:
        raise StepFailedError(
            "the trained adapter changes no logit of its base",
            "train longer or with a higher learning rate",
        )
    return effect


def _without_adapter(model: Any, row: TokenRow) -> Any:
    with model.disable_adapter():
        return row_logits(model, row)
