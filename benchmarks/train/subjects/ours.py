"""The toolkit's own code: the model, the loss and the optimizer of its train stage."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.train import rows
from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock
from benchmarks.train.shapes import SHAPES

LORA = {"rank": 16, "alpha": 32}


def section(case: Case, batch: int) -> tuple[Any, list[str]]:
    """The recipe's section, and the settings that this commit's recipe does not know."""
    from toolkit.recipe.train import TrainSection

    known = {k: v for k, v in case.settings.items() if k in TrainSection.model_fields}
    values = {"lora": LORA, "batch_size": batch, "learning_rate": 1e-4, "packing": False} | known
    return TrainSection(**values), sorted(set(case.settings) - set(known))


def measure(case: Case, batch: int, folder: Path, clock: Clock) -> None:
    """Steps of ``train.sft`` without its reading, logging and saving."""
    import torch

    from toolkit.train.loss import summed_loss
    from toolkit.train.model import build_model, numerics_for, trainable, use_cores
    from toolkit.train.optimizer import build_optimizer

    use_cores()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, unknown = section(case, batch)
    if unknown:
        clock.facts["settings_not_in_this_commit"] = unknown
    numerics = numerics_for(config, device)
    model = build_model(folder, config, numerics, device, {"source": "benchmark"})
    optimizer = build_optimizer(model, config)
    weights = [weight for _, weight in trainable(model)]
    clock.facts["trainable_parameters"] = sum(weight.numel() for weight in weights)
    batches = batches_of(case, batch, clock.total)
    clock.built()
    for each in batches:
        loss = summed_loss(model, each) / each.trained_tokens
        loss.backward()
        value = float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(norm)
        clock.facts |= path_of(model)
        clock.tick(each.tokens, value)


def path_of(model: Any) -> dict[str, Any]:
    """What ``speed: auto`` came to in this process; nothing on the plain path."""
    speed = getattr(model, "speed", None)
    if speed is None:
        return {"path": "plain"}
    found = {"path": speed.choice.path, "layers_keep": dict(Counter(speed.keep))}
    return found | ({"gave_up": speed.gave_up} if speed.gave_up else {})


def batches_of(case: Case, batch: int, count: int) -> Iterator[Any]:
    """The micro-batches of ``count`` steps."""
    vocabulary = SHAPES[case.shape].vocab_size
    if case.rows == "full":
        return (rows.full_batch(batch, case.sequence, vocabulary, seed) for seed in range(count))
    return _real_rows(case, batch, count, vocabulary)


def _real_rows(case: Case, batch: int, count: int, vocabulary: int) -> Iterator[Any]:
    from toolkit.data.store import TokenStore
    from toolkit.recipe.train import TrainSection
    from toolkit.train.batches import collate
    from toolkit.train.order import micro_batches

    # enough rows for every step, whichever way they are laid
    lengths = rows.log_normal_lengths(max(count * batch * 12, 256), case.sequence)
    numbers = list(range(len(lengths)))
    if case.rows == "padded":  # in the order of the data, as trainers do when told nothing
        planned = [
            [[row] for row in numbers[at : at + batch]] for at in range(0, len(numbers), batch)
        ]
    else:
        config = TrainSection(batch_size=batch, packing=case.rows == "packed")
        planned = micro_batches(numbers, lengths, config, case.sequence, (3, 0))
    with tempfile.TemporaryDirectory() as made:
        rows.write_store(Path(made) / "rows", lengths, vocabulary)
        store = TokenStore(Path(made) / "rows")
        for sequences in planned[:count]:
            yield collate(store, sequences)
