"""Rules on training with several GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.facts import Facts
from toolkit.preflight.verdict import Finding, refuse, rule
from toolkit.recipe import Recipe


@rule(
    "train.parallel",
    "an optimizer whose state is shared out keeps one number for each weight",
    "bitsandbytes, optim/optimizer.py: 8-bit state is quantized in blocks of 256 with scales apart; a "
    "part of a weight has no blocks of its own",
    "set train.optimizer: adamw, or train.parallel: ddp",
)
def shared_state(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """DDP keeps the state whole on each GPU."""
    train = recipe.train
    if train is None or train.optimizer != "adamw_8bit":
        return
    if train.parallel in ("zero2", "zero3", "fsdp"):
        yield refuse(
            f"train.parallel is {train.parallel}, which shares out the optimizer's state, but that of "
            "train.optimizer adamw_8bit is kept in blocks",
            "set train.optimizer: adamw (its state is shared out too), or train.parallel: ddp",
        )


RULES = (shared_state,)
