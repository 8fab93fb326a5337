"""Supervised fine-tuning: the step loop, to be read from top to bottom."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from toolkit.data.store import TokenStore
from toolkit.errors import ArtifactError, StepFailedError
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train import checkpoint, expected, parallel
from toolkit.train.batches import (
    collate,
    counts_of,
    lengths_array,
    lengths_of,
    rows_with_targets,
)
from toolkit.train.checkpoint import Position
from toolkit.train.finite import not_finite
from toolkit.train.heldout import heldout_loss
from toolkit.train.interrupt import StopOnTerm
from toolkit.train.model import Numerics, build_model
from toolkit.train.oom import Guard, gpu_bytes
from toolkit.train.order import MicroBatch, RowLedger, Step, micro_batches, plan_steps
from toolkit.train.parallel import again
from toolkit.train.parallel.engine import Engine
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.parallel.share import share
from toolkit.train.schedule import factor, warmup_steps
from toolkit.train.start import start_file
from toolkit.train.watch.flops import work_of_run
from toolkit.train.watch.watch import Limit, Watch


@dataclass(frozen=True)
class Outcome:
    """A trained model and what is known of the run."""

    engine: Engine
    position: Position
    final_loss: float
    heldout_loss: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    """Numbers that other objectives than SFT are judged by: margins, rewards."""
    watched: Mapping[str, float] = field(default_factory=dict)
    """What it made of the device: MFU, utilisation, power, energy."""


@dataclass(frozen=True)
class Rows:
    """What the loop reads: stored rows, the whole plan, and the batches of the held-out loss."""

    train: TokenStore
    steps: list[Step]
    heldout: TokenStore
    heldout_batches: list[MicroBatch]


def fine_tune(
    config: TrainSection,
    max_length: int,
    seed: int,
    numerics: Numerics,
    *,
    ranks: Ranks,
    ctx: StageContext,
) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the last step.

    Raises:
        DataError: No row has a trained token.
        PreflightError: A target of the adapter is not in the model.
        StepFailedError: The loss is not finite, or SIGTERM came; a checkpoint is kept.
        ArtifactError: A checkpoint is damaged or belongs to other rows.
    """
    saved, position = _newest(config, ranks, ctx)
    rows = read_rows(ctx.inputs["dataset"].path, config, position, max_length, seed)
    _same_rows(saved, position, rows.steps, ctx)
    takes = expected.setup_of_run(config, ctx, numerics, rows, ranks)
    expected.say(takes, gpu_bytes(), ctx)
    total = len(rows.steps)
    limit = Limit.measure(work_of_run(config, ctx, numerics), ranks, ctx)
    watch = Watch(limit, ranks, ctx, position, total)
    engine = build(saved, config, numerics, ranks, seed=seed, ctx=ctx)
    keep = partial(checkpoint.save_alone, ctx.state / "checkpoints", engine, position)
    guard = Guard(config, takes, ctx, engine, keep)
    warmup = warmup_steps(total, config.warmup)
    loss, scored = math.nan, None

    with StopOnTerm() as stop, watch:
        for step in rows.steps[position.step :]:
            watch.begin(position.step + 1)
            started = time.perf_counter()
            rate = config.learning_rate * factor(position.step, total, warmup, config.schedule)
            tokens, trained = counts_of(rows.train, step.rows)
            loss = guard.run(
                step,
                position.step,
                partial(gradients, engine, trained=trained, rows=rows, done=position.step, ctx=ctx),
            )
            norm = engine.update(rate)
            if not math.isfinite(norm):
                not_finite("gradient norm", norm, f"at step {position.step + 1}", step.rows)

            position.step += 1
            position.rows.add(step.rows)
            position.tokens += tokens
            position.trained_tokens += trained
            seconds = time.perf_counter() - started
            position.seconds += seconds
            lengths = lengths_array(rows.train, step.rows)
            watch.end(position.step, seconds, tokens, lengths, trained)
            last = position.step == total
            if last or position.step % config.log_every == 0:
                ctx.log(
                    position.step,
                    loss=loss,
                    learning_rate=rate,
                    grad_norm=norm,
                    trained_tokens=position.trained_tokens,
                    epoch=step.epoch + 1,
                    **watch.numbers(),
                )
            shown = {**watch.shown(), "learning_rate": rate, "grad_norm": norm}
            ctx.progress(position.step, total, "steps", loss=f"{loss:.4f}", **shown)
            if rows.heldout_batches and (last or _due(position.step, config.evaluate_every)):
                scored = _score(engine, rows, position.step, ctx)
            stopping = not last and ranks.any(stop.requested)
            if not last and (stopping or _due(position.step, config.checkpoint_every)):
                folder = ctx.state / "checkpoints"
                watch.settle(position)
                checkpoint.save(folder, engine, position, ctx.output / "metrics.jsonl")
            if stopping:
                raise StepFailedError(
                    f"training was asked to stop (SIGTERM), after step {position.step} of {total}",
                    "a checkpoint is kept: run the same command again and it goes on from there",
                )
        watch.settle(position)
    _prove_each_row_once(position, rows.steps)
    return Outcome(engine, position, loss, scored, watched=watch.summary())


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _newest(config: TrainSection, ranks: Ranks, ctx: StageContext) -> tuple[Path | None, Position]:
    """The checkpoint to go on from, and where it was; the start where there is none.

    A step keeps the micro-batches that it had on the ranks that it was started with.
    """
    folder = ctx.state / "checkpoints"
    if not ctx.resume and ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
    ranks.wait()
    found = checkpoint.newest(folder)
    here = config.gradient_accumulation * ranks.count
    if found is None:
        return None, Position(micro_batches=here)
    position = checkpoint.read_position(found)
    if position.micro_batches != here:
        ctx.note(
            f"the run began with {position.micro_batches} passes of {config.batch_size} sequences a "
            f"step, and keeps them: {ranks.count} processes would take {here}"
        )
    return found, position


def read_rows(
    dataset: Path, config: TrainSection, position: Position, max_length: int, seed: int
) -> Rows:
    """What the loop reads, planned from the first step to the last.

    Raises:
        DataError: No row has a trained token, or one is too long.
    """
    import numpy as np

    train = TokenStore(dataset / "tokens" / "train")
    usable = rows_with_targets(train)
    together = config.model_copy(update={"gradient_accumulation": position.micro_batches})
    steps = plan_steps(usable, lengths_of(train, usable), together, max_length, seed)
    heldout = TokenStore(dataset / "tokens" / "heldout")
    scored = rows_with_targets(heldout)
    chosen = np.random.default_rng((seed, 1)).permutation(len(scored))[: config.evaluate_rows]
    scored = [scored[i] for i in sorted(chosen.tolist())]
    # never packed: few rows, and which are compared does not depend on how the recipe packs
    apart = config.model_copy(update={"packing": False})
    batches = micro_batches(scored, lengths_of(heldout, scored), apart, max_length, (seed, 0))
    return Rows(train, steps, heldout, batches)


def _same_rows(
    saved: Path | None, position: Position, steps: list[Step], ctx: StageContext
) -> None:
    """A checkpoint belongs to this plan."""
    before = again.why_here(ctx.state)
    if before is not None:
        checkpoint.trim_log(saved, position.step, ctx)
        ctx.note(before.says)
        ctx.log(before.step, out_of_memory=1.0, sequences_at_once=float(before.at_once))
    if saved is None:
        ctx.note(f"training {len(steps)} steps")
        return
    if position.rows != RowLedger.of(steps[: position.step]):
        raise ArtifactError(
            f"checkpoint {saved} saw other rows, or saw them in another order, than this run would",
            f"the data or the seed changed: remove {saved.parent} to start anew",
        )
    if before is None:
        checkpoint.restore_log(saved, ctx)
    ctx.note(f"going on after step {position.step} of {len(steps)}, {position.rows.seen} rows seen")


def build(
    saved: Path | None,
    config: TrainSection,
    numerics: Numerics,
    ranks: Ranks,
    *,
    seed: int,
    ctx: StageContext,
) -> Engine:
    """The model in its engine, as the checkpoint left both."""
    base = ctx.inputs["model"]
    kind = parallel.engine_of(config.parallel, ranks)
    seed_everything(seed)
    ctx.note(f"loading the base model ({numerics.trained_on})")
    place = kind.built_on(base.path, ctx.device)
    start = start_file(ctx.state, resume=ctx.resume)
    model = build_model(
        base.path, config, numerics, ctx.device, base.facts, place=place, start=start
    )
    if ctx.speaks and (speed := getattr(model, "speed", None)):
        speed.say = ctx.note
    if saved is not None:
        checkpoint.load_weights(saved, model)
    engine = kind(model, config, numerics, ranks)
    if ranks.rank:
        seed_everything(seed + ranks.rank)  # weights began alike; dropout differs
    if saved is not None:
        checkpoint.load_progress(saved, engine)
    return engine


def gradients(
    engine: Engine, step: Step, trained: int, rows: Rows, done: int, *, ctx: StageContext
) -> float:
    """Add up the gradients of one step; return its loss.

    Every trained token of the step weighs the same, in whichever micro-batch it stands and on
    whichever rank: engines average gradients over ranks, so each sends its own times their number.
    """
    ranks = engine.ranks
    turns = share(step.batches, ranks.rank, ranks.count)
    losses = []
    for index, turn in enumerate(turns):
        batch = collate(rows.train, turn.sequences)
        scale = 0.0 if turn.idle else ranks.count / trained
        losses.append(engine.gradients(batch, scale, last=index + 1 == len(turns)))
        if index + 1 < len(turns):
            ctx.progress(done + (index + 1) / len(turns), len(rows.steps), "steps")
    values = [float(loss) for loss in losses]
    (total,) = ranks.total(sum(values) / ranks.count)
    if not math.isfinite(total):
        bad = [t for t, value in zip(turns, values, strict=True) if not math.isfinite(value)]
        mine = [row for turn in bad for sequence in turn.sequences for row in sequence]
        every = [row for theirs in ranks.all_of(mine) for row in theirs]
        not_finite("loss", total, f"at step {done + 1}", every)
    return total


def _score(engine: Engine, rows: Rows, step: int, ctx: StageContext) -> float:
    """The held-out loss after a step."""
    ctx.note(f"held-out loss over {sum(map(len, rows.heldout_batches))} rows")
    scored = heldout_loss(engine, rows.heldout, rows.heldout_batches)
    if not math.isfinite(scored):
        not_finite("held-out loss", scored, f"after step {step}", None)
    ctx.log(step, heldout_loss=scored)
    return scored


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _prove_each_row_once(position: Position, steps: list[Step]) -> None:
    """What was seen, over all interruptions, is the plan, and no epoch of it has a row twice."""
    for epoch in {step.epoch for step in steps}:
        seen = [row for step in steps if step.epoch == epoch for row in step.rows]
        if len(seen) != len(set(seen)):
            raise StepFailedError(
                f"epoch {epoch + 1} holds a row more than once", "report this as a bug"
            )
    if position.rows != RowLedger.of(steps):
        raise StepFailedError(
            f"the rows seen are not those planned ({position.rows.seen} seen)",
            "report this as a bug, and start anew by removing the checkpoints",
        )
