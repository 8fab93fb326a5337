"""What a run will take, from its real rows: the worst micro-batch and the forecast for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.errors import PreflightError
from toolkit.forecast import training
from toolkit.forecast.block import Rows
from toolkit.forecast.changes import smallest
from toolkit.forecast.parts import Fit, gib, summed
from toolkit.forecast.training import Setup
from toolkit.preflight.base_facts import BaseFacts, shape_of
from toolkit.preflight.memory import setup_of
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train.model import machine
from toolkit.train.oom import gpu_bytes
from toolkit.train.order import MicroBatch, Step
from toolkit.train.speed.choose import choose

if TYPE_CHECKING:
    from toolkit.data.store import TokenStore
    from toolkit.train.model import Numerics
    from toolkit.train.parallel.ranks import Ranks
    from toolkit.train.sft import Rows as Planned


def sizes(store: TokenStore, batch: MicroBatch) -> Rows:
    """B, T and N of a micro-batch, as ``collate`` lays it out."""
    lengths = [
        sum(int(store.offsets[row + 1] - store.offsets[row]) for row in rows) for rows in batch
    ]
    trained = sum(int(store[row].trained[1:].sum()) for rows in batch for row in rows)
    apart = any(len(rows) > 1 for rows in batch)
    return Rows(len(batch), max(lengths), trained, apart)


def worst(store: TokenStore, steps: Sequence[Step], setup: Setup | None) -> MicroBatch:
    """The micro-batch that the forecast says takes most; the one with most tokens without a forecast."""
    return max(_largest(steps), key=lambda batch: _takes(sizes(store, batch), setup))


def _largest(steps: Sequence[Step]) -> Iterable[MicroBatch]:
    """Micro-batches of the first epoch: later ones hold the same rows."""
    first = [batch for step in steps if step.epoch == 0 for batch in step.batches]
    return first or [batch for step in steps for batch in step.batches]


def _takes(rows: Rows, setup: Setup | None) -> int:
    if setup is None:
        return rows.tokens
    return training.forecast(replace(setup, rows=rows)).total


def setup_of_run(
    config: TrainSection,
    ctx: StageContext,
    numerics: Numerics,
    planned: Planned,
    ranks: Ranks,
) -> Setup | None:
    """What decides this run's memory; ``None`` where the base is not a dense decoder."""
    found = _without_rows(config, ctx, numerics, ranks)
    if found is None:
        return None
    setup, packs = found
    rows = sizes(planned.train, worst(planned.train, planned.steps, setup))
    setup = replace(setup, rows=replace(rows, apart=rows.apart and not packs))
    if config.gradient_checkpointing == "auto":
        setup = training.roomiest(setup, gpu_bytes())
    return setup


def setup_of_objective(
    config: TrainSection, max_length: int, ctx: StageContext, numerics: Numerics, ranks: Ranks
) -> Setup | None:
    """The same for other objectives than SFT, taken for SFT on as many sequences of the greatest length."""
    found = _without_rows(config, ctx, numerics, ranks)
    if found is None:
        return None
    sequences = config.batch_size * (2 if config.objective in ("dpo", "orpo") else 1)
    return replace(found[0], rows=Rows(sequences, max_length, sequences * max_length))


def _without_rows(
    config: TrainSection, ctx: StageContext, numerics: Numerics, ranks: Ranks
) -> tuple[Setup, bool] | None:
    """What decides the memory but for the rows, and whether packed rows need no mask."""
    base = ctx.inputs["model"].path
    settings = json.loads((base / "config.json").read_text())
    shape = shape_of(BaseFacts(settings))
    if shape is None:
        return None
    width = 2 if numerics.precision == "bf16" else 4
    speed = choose(config, settings, machine(ctx.device))
    setup = setup_of(config, shape, Rows(1, 1, 1), width, speed, gpus=ranks.count)
    return setup, speed.packs


def say(setup: Setup | None, memory: int | None, ctx: StageContext) -> None:
    """Note the forecast; refuse what cannot fit, before the base is loaded.

    Raises:
        PreflightError: No error of the forecast could make it fit.
    """
    if setup is None or memory is None:
        return
    found = training.forecast(setup, memory)
    ctx.note(f"forecast: {summed(found.parts)} of {gib(memory)} GiB ({found.fit})")
    if found.fit is Fit.too_large:
        proposal = smallest(setup, memory)
        raise PreflightError(
            f"training does not fit: {summed(found.parts)} of {gib(memory)} GiB",
            f"set {proposal.text}" if proposal else "take a larger GPU",
        )
