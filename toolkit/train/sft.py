"""Supervised fine-tuning: the step loop, to be read from top to bottom."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.data.store import TokenStore
from toolkit.errors import ArtifactError, StepFailedError
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train import checkpoint
from toolkit.train.batches import collate, lengths_of, rows_with_targets
from toolkit.train.checkpoint import Position
from toolkit.train.interrupt import StopOnTerm
from toolkit.train.loss import mean_loss, summed_loss
from toolkit.train.model import Numerics, build_model, trainable
from toolkit.train.optimizer import build_optimizer, set_learning_rate
from toolkit.train.order import MicroBatch, RowLedger, Step, micro_batches, plan_steps
from toolkit.train.schedule import factor, warmup_steps


@dataclass(frozen=True)
class Outcome:
    """A trained model and what is known of the run."""

    model: Any
    position: Position
    final_loss: float
    heldout_loss: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    """Numbers that other objectives than SFT are judged by: margins, rewards."""


@dataclass(frozen=True)
class _Rows:
    """What the loop reads: stored rows, the whole plan, and the batches of the held-out loss."""

    train: TokenStore
    steps: list[Step]
    heldout: TokenStore
    heldout_batches: list[MicroBatch]


def fine_tune(
    config: TrainSection, max_length: int, seed: int, numerics: Numerics, ctx: StageContext
) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the last step.

    Raises:
        DataError: No row has a trained token.
        PreflightError: A target of the adapter is not in the model.
        StepFailedError: The loss is not finite, or SIGTERM came; a checkpoint is kept.
        ArtifactError: A checkpoint is damaged or belongs to other rows.
    """
    base = ctx.inputs["model"]
    rows = _read_rows(ctx.inputs["dataset"].path, config, max_length, seed)
    seed_everything(seed)
    ctx.note(f"loading the base model ({numerics.trained_on})")
    model = build_model(base.path, config, numerics, ctx.device, base.facts)
    optimizer = build_optimizer(model, config)
    position = _start(model, optimizer, rows.steps, ctx)
    total = len(rows.steps)
    warmup = warmup_steps(total, config.warmup)
    loss, heldout_loss = math.nan, None

    with StopOnTerm() as stop:
        for step in rows.steps[position.step :]:
            started = time.perf_counter()
            rate = config.learning_rate * factor(position.step, total, warmup, config.schedule)
            set_learning_rate(optimizer, rate)
            loss, tokens, trained = _gradients(model, step, rows, position.step, ctx)
            norm = _clip(model, config.max_grad_norm, position.step, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            position.step += 1
            position.rows.add(step.rows)
            position.tokens += tokens
            position.trained_tokens += trained
            seconds = time.perf_counter() - started
            position.seconds += seconds
            last = position.step == total
            if last or position.step % config.log_every == 0:
                ctx.log(
                    position.step,
                    loss=loss,
                    learning_rate=rate,
                    grad_norm=norm,
                    tokens_per_second=tokens / seconds,
                    trained_tokens=position.trained_tokens,
                    epoch=step.epoch + 1,
                )
            _report(ctx, position, total, loss)
            if rows.heldout_batches and (last or _due(position.step, config.evaluate_every)):
                heldout_loss = _heldout_loss(model, rows, ctx)
                ctx.log(position.step, heldout_loss=heldout_loss)
            if not last and (stop.requested or _due(position.step, config.checkpoint_every)):
                _save(model, optimizer, position, ctx)
            if not last and stop.requested:
                raise StepFailedError(
                    f"training was asked to stop (SIGTERM), after step {position.step} of {total}",
                    "a checkpoint is kept: run the same command again and it goes on from there",
                )
    _prove_each_row_once(position, rows.steps)
    return Outcome(model, position, loss, heldout_loss)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _read_rows(dataset: Path, config: TrainSection, max_length: int, seed: int) -> _Rows:
    import numpy as np

    train = TokenStore(dataset / "tokens" / "train")
    usable = rows_with_targets(train)
    steps = plan_steps(usable, lengths_of(train, usable), config, max_length, seed)
    heldout = TokenStore(dataset / "tokens" / "heldout")
    scored = rows_with_targets(heldout)
    chosen = np.random.default_rng((seed, 1)).permutation(len(scored))[: config.evaluate_rows]
    scored = [scored[i] for i in sorted(chosen.tolist())]
    # never packed: few rows, and which are compared does not depend on how the recipe packs
    apart = config.model_copy(update={"packing": False})
    batches = micro_batches(scored, lengths_of(heldout, scored), apart, max_length, (seed, 0))
    return _Rows(train, steps, heldout, batches)


def _start(model: Any, optimizer: Any, steps: list[Step], ctx: StageContext) -> Position:
    folder = ctx.state / "checkpoints"
    if not ctx.resume:
        shutil.rmtree(folder, ignore_errors=True)
    found = checkpoint.newest(folder)
    if found is None:
        ctx.note(f"training {len(steps)} steps")
        return Position()
    position = checkpoint.load(found, model, optimizer)
    if position.rows != RowLedger.of(steps[: position.step]):
        raise ArtifactError(
            f"checkpoint {found} saw other rows, or saw them in another order, than this run would",
            f"the data or the seed changed: remove {folder} to start anew",
        )
    checkpoint.restore_log(found, ctx)
    ctx.note(f"going on after step {position.step} of {len(steps)}, {position.rows.seen} rows seen")
    return position


def _gradients(
    model: Any, step: Step, rows: _Rows, done: int, ctx: StageContext
) -> tuple[float, int, int]:
    """Add up the gradients of one step; return its loss, tokens and trained tokens.

    Every trained token of the step weighs the same, in whichever micro-batch it stands.
    """
    batches = [collate(rows.train, sequences) for sequences in step.batches]
    trained = sum(batch.trained_tokens for batch in batches)
    losses = []
    for index, batch in enumerate(batches):
        loss = summed_loss(model, batch) / trained
        loss.backward()
        losses.append(loss.detach())
        if index + 1 < len(batches):
            ctx.progress(done + (index + 1) / len(batches), len(rows.steps), "steps")
    values = [float(loss) for loss in losses]
    bad = [batch for batch, value in zip(batches, values, strict=True) if not math.isfinite(value)]
    if bad:
        _not_finite("loss", sum(values), done, [row for batch in bad for row in batch.rows])
    return sum(values), sum(batch.tokens for batch in batches), trained


def _clip(model: Any, max_norm: float, done: int, step: Step) -> float:
    """Scale gradients down to ``max_norm``; return the norm they had."""
    import torch

    norm = float(torch.nn.utils.clip_grad_norm_([w for _, w in trainable(model)], max_norm))
    if not math.isfinite(norm):
        _not_finite("gradient norm", norm, done, step.rows)
    return norm


def _not_finite(what: str, value: float, done: int, rows: list[int]) -> None:
    shown = ", ".join(map(str, rows[:20])) + (
        f" and {len(rows) - 20} more" if len(rows) > 20 else ""
    )
    raise StepFailedError(
        f"the {what} is {value} at step {done + 1}, in rows {shown} of train.jsonl (first is 0)",
        "lower train.learning_rate, look at those rows, or set train.precision: fp32",
    )


def _heldout_loss(model: Any, rows: _Rows, ctx: StageContext) -> float:
    ctx.note(f"held-out loss over {sum(map(len, rows.heldout_batches))} rows")
    return mean_loss(model, rows.heldout, rows.heldout_batches)


def _save(model: Any, optimizer: Any, position: Position, ctx: StageContext) -> None:
    folder = ctx.state / "checkpoints"
    checkpoint.save(folder, model, optimizer, position, ctx.output / "metrics.jsonl")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _report(ctx: StageContext, position: Position, total: int, loss: float) -> None:
    left = position.seconds / position.step * (total - position.step)
    ctx.progress(
        position.step,
        total,
        "steps",
        loss=f"{loss:.4f}",
        tokens_per_second=round(position.tokens / position.seconds, 1),
        eta_s=round(left),
    )


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
