"""Checkpoints of TRL's trainers: theirs, with position, log and sizes beside what they write.

One is complete once it holds :data:`MARK`::

    trl/checkpoint-50/
    ├── ...            weights, optimizer, schedule, generators, as the Trainer writes them
    ├── metrics.jsonl  what was logged so far
    └── toolkit.json   position, ledger, and the sizes of the other files
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from toolkit.errors import ArtifactError
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train import checkpoint
from toolkit.train.checkpoint import Position
from toolkit.train.checkpoint_files import flush, insist_on, readable, sizes
from toolkit.train.parallel.ranks import Ranks

MARK = "toolkit.json"


def folder_of(ctx: StageContext) -> Path:
    """Where the Trainer keeps its checkpoints."""
    return ctx.state / "trl"


def step_of(found: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return int(found.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return max(
        (mark.parent for mark in folder.glob(f"checkpoint-*/{MARK}")), key=step_of, default=None
    )


def began(ctx: StageContext, config: TrainSection, ranks: Ranks) -> Position:
    """Where the newest checkpoint was; a step keeps the passes that it had on the ranks it began with.

    Raises:
        ArtifactError: The ranks cannot share them out, or a file of the checkpoint is damaged or gone.
    """
    folder = folder_of(ctx)
    if not ctx.resume and ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
    ranks.wait()
    found = newest(folder)
    here = config.gradient_accumulation * ranks.count
    if found is None:
        return Position(micro_batches=here)
    with readable(found):
        stored = json.loads((found / MARK).read_text())
        files = stored.pop("files", {})
        position = checkpoint.position_of(stored)
    insist_on(found, files)
    passes = position.micro_batches
    if passes % ranks.count:
        raise ArtifactError(
            f"the run began with {passes} passes of {config.batch_size} sequences a step, which "
            f"{ranks.count} processes cannot share out",
            f"go on with 1 or {passes} processes, or remove {folder} to start anew",
        )
    if passes != here:
        ctx.note(
            f"the run began with {passes} passes of {config.batch_size} sequences a step, and keeps "
            f"them: {ranks.count} processes would take {here}"
        )
    return position


def restore(ctx: StageContext, position: Position, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from, its log written anew; what was cut off while it was written goes.

    Raises:
        ArtifactError: Its log is damaged.
    """
    folder = folder_of(ctx)
    found = newest(folder)
    ranks.wait()
    for other in folder.glob("checkpoint-*") if ranks.first else ():
        if not (other / MARK).exists():
            shutil.rmtree(other)
    if found is None:
        return None
    checkpoint.restore_log(found, ctx)
    ctx.note(f"going on after step {position.step}, {position.rows.seen} rows seen")
    return found


def mark(written: Path, position: Position, ctx: StageContext) -> None:
    """Complete what the Trainer wrote; on the first rank, after all of them."""
    log = ctx.output / "metrics.jsonl"
    if log.exists():
        shutil.copyfile(log, written / log.name)
    state = asdict(position) | {"files": sizes(written)}
    part = written / f"{MARK}.part"
    part.write_text(json.dumps(state))
    flush(written)
    part.rename(written / MARK)
