"""Perplexity: exp of the mean negative log-likelihood over the tokens that training would learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.data.store import TokenRow


def row_losses(
    model: Any, rows: Sequence[TokenRow], *, batch_size: int
) -> Iterator[tuple[int, float, int]]:
    """Yield (index of the row, summed negative log-likelihood in nats, trained tokens), longest rows first.

    Rows are padded on the right, where causal attention never looks.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        losses = _losses(model, [rows[index] for index in batch])
        for index, loss in zip(batch, losses, strict=True):
            yield index, loss, int(rows[index].trained[1:].sum())


def _losses(model: Any, rows: Sequence[TokenRow]) -> list[float]:
    import numpy as np
    import torch

    longest = max(len(row.ids) for row in rows)
    ids: Any = np.zeros((len(rows), longest), np.int64)
    targets: Any = np.full((len(rows), longest), -100, np.int64)  # -100: not a target
    attended: Any = np.zeros((len(rows), longest), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = row.ids
        targets[place, : len(row.ids)] = np.where(row.trained, row.ids, -100)
        attended[place, : len(row.ids)] = 1
    device = model.device
    with torch.inference_mode():
        logits = model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(attended).to(device),
            use_cache=False,
        ).logits  # [batch, tokens, vocabulary]
        wanted = torch.from_numpy(targets).to(device)[:, 1:]
        return [_row_loss(row, target) for row, target in zip(logits[:, :-1], wanted, strict=True)]


def _row_loss(logits: Any, target: Any) -> float:
    """Sum over one row, so that the fp32 copy of its logits [tokens, vocabulary] stays small."""
    import torch

    kept = target != -100
    loss = torch.nn.functional.cross_entropy(logits[kept].float(), target[kept], reduction="sum")
    return float(loss)
