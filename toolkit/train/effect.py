"""An adapter must act: one that trains and does nothing is the most silent failure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from toolkit.data.store import TokenRow
from toolkit.errors import StepFailedError
from toolkit.train.parallel.engine import Engine
from toolkit.train.start import restored

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


def adapter_effect(engine: Engine, row: TokenRow, start: Mapping[str, Any] | None = None) -> float:
    """Largest difference that training made to a logit of ``row``; all ranks call.

    Args:
        engine: Around a PEFT model.
        row: Its first :data:`LONGEST` tokens are looked at.
        start: A and B before the first step, where B was not zero.

    Raises:
        StepFailedError: The adapter is as it started, or changes no logit, or makes one that is no number.
    """
    products = {
        name.replace(".default.", "."): weight
        for name, weight in engine.weights()
        if "lora_B" in name
    }
    if not any(_moved(weight, start and start[name]) for name, weight in products.items()):
        where = "where they started" if start else "at zero"
        raise StepFailedError(
            f"training left all {len(products)} adapter matrices B {where}: it does nothing",
            "look at the learning rate, the number of steps and the loss in metrics.jsonl; with grpo at "
            "reward_std: answers that are all rated alike teach nothing",
        )
    with engine.scoring():
        adapted = engine.call(row_logits, row)
        plain = engine.call(_as_it_started, row, start)
    effect = float((adapted - plain).abs().max())
    if not math.isfinite(effect):
        raise StepFailedError(
            f"with the trained adapter a logit differs from its base by {effect}",
            "lower train.learning_rate, and look at loss and grad_norm in metrics.jsonl",
        )
    if effect == 0:
        raise StepFailedError(
            "the trained adapter changes no logit of its base",
            "train longer or with a higher learning rate",
        )
    return effect


def _as_it_started(model: Any, row: TokenRow, start: Mapping[str, Any] | None) -> Any:
    with restored(model, dict(start)) if start else model.disable_adapter():
        return row_logits(model, row)


def _moved(weight: Any, start: Any) -> bool:
    return bool((weight.cpu() != start.cpu()).any()) if start is not None else bool(weight.any())
