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


@rule(
    "train.parallel_objective",
    "preferences and rewards are trained data parallel",
    "train/trainer.py: TRL's trainers over Accelerate, tested with DDP",
    "set train.parallel: auto or ddp",
)
def whole_objectives(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Every process holds the model."""
    train = recipe.train
    if train is None or train.objective == "sft" or facts.ranks == 1:
        return
    if train.parallel not in ("auto", "ddp"):
        yield refuse(
            f"train.objective is {train.objective!r} and train.parallel {train.parallel!r}: this objective trains "
            "with ddp alone",
            "set train.parallel: ddp, with train.method: qlora or a smaller base if it does not fit",
        )


RULES = (shared_state, whole_objectives)
