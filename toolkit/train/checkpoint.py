"""Checkpoints: everything a run needs to go on to the same result, complete or absent.

::

    checkpoints/step-00000050/
    ├── weights-00-000.safetensors     trainable weights, each whole, by name
    ├── optimizer-00-000.safetensors   what the optimizer keeps for each of them
    ├── numbers.json                  the same, where it is a plain number
    ├── random-00.pt                   torch's generators of rank 0 (CPU, GPU)
    ├── state.json                     position, ledger, counters, generators of Python and numpy
    └── metrics.jsonl                  what was logged so far

Ranks take turns in writing the weights (``-01-``: rank 1), but every tensor is whole and has its
name: any number of ranks, with any engine, can go on from it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from toolkit.stages import StageContext
from toolkit.train.checkpoint_files import flush, insist_on, readable, sizes, unusable, writing
from toolkit.train.model import trainable
from toolkit.train.order import RowLedger
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.shards import Shards, ShardWriter

if TYPE_CHECKING:
    from toolkit.train.parallel.engine import Engine

KEPT = 2


@dataclass
class Position:
    """How far a run is."""

    micro_batches: int = 1  # of one step, over all ranks: the effective batch outlives their number
    step: int = 0  # optimizer steps done
    rows: RowLedger = field(default_factory=RowLedger)
    tokens: int = 0  # seen, without padding
    trained_tokens: int = 0
    seconds: float = 0.0  # in steps, without evaluation and checkpoints
    energy_kwh: float = 0.0  # of the GPUs of all machines, where the driver tells it


def save(folder: Path, engine: Engine, position: Position, metrics: Path) -> Path:
    """Write a checkpoint, then drop all but the newest :data:`KEPT`; return its folder.

    All ranks call; ``folder`` is on a file system that they share.

    Raises:
        StepFailedError: The disk is full, or cannot be written; older checkpoints stay.
    """
    with writing(folder, position.step, newest(folder)):
        return _save(folder, engine, position, metrics)


def _save(folder: Path, engine: Engine, position: Position, metrics: Path) -> Path:
    ranks = engine.ranks
    final = folder / f"step-{position.step:08d}"
    part = folder / f"{final.name}.part"
    if ranks.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.wait()
    _write_tensors(part, engine, ranks)
    _write_generators(part, ranks.rank)
    ranks.wait()
    if ranks.first:
        if metrics.exists():
            shutil.copyfile(metrics, part / "metrics.jsonl")
        _write_state(part, position)
        flush(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in _complete(folder)[:-KEPT]:
            shutil.rmtree(old)
    ranks.wait()
    return final


def save_alone(folder: Path, engine: Engine, position: Position) -> None:
    """Write a checkpoint on one rank that holds everything, while the others may hang; once if several do.

    The log is added when the run goes on (:func:`trim_log`): another rank writes it.
    """
    final = folder / f"step-{position.step:08d}"
    if not position.step or final.exists():
        return
    part = folder / f"{final.name}.{os.getpid()}.part"
    part.mkdir(parents=True)
    _write_tensors(part, engine, Ranks())
    _write_generators(part, engine.ranks.rank)
    _write_state(part, position)
    flush(part)
    try:
        part.rename(final)
    except OSError:  # another rank was faster
        shutil.rmtree(part)


def _write_tensors(part: Path, engine: Engine, among: Ranks) -> None:
    """Each weight is gathered by all ranks and written by one, who may then forget it."""
    rank, ranks = among.rank, among.count
    weights = ShardWriter(part, f"weights-{rank:02d}")
    for number, (name, weight) in enumerate(engine.weights()):
        if number % ranks == rank:
            weights.add(name, weight)
    weights.close()
    kept = ShardWriter(part, f"optimizer-{rank:02d}")
    numbers: dict[str, float] = {}
    for number, (name, moments) in enumerate(engine.moments()):
        for key, value in moments.items():
            if not hasattr(value, "shape"):
                numbers[f"{name}/{key}"] = value
            elif number % ranks == rank:
                kept.add(f"{name}/{key}", value)
    kept.close()
    if among.first:
        (part / "numbers.json").write_text(json.dumps(numbers))


def _write_generators(part: Path, rank: int) -> None:
    import torch

    torch.save(_torch_generators(), part / f"random-{rank:02d}.pt")


def _write_state(part: Path, position: Position) -> None:
    """Last of all: it knows the other files."""
    state = {
        "position": asdict(position),
        "generators": _plain_generators(),
        "files": sizes(part),
    }
    (part / "state.json").write_text(json.dumps(state))


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def read_position(checkpoint: Path) -> Position:
    """Where the run was.

    Raises:
        ArtifactError: A file is damaged or gone.
    """
    state = _state(checkpoint)
    insist_on(checkpoint, state.get("files", {}))
    with readable(checkpoint):
        return position_of(state["position"])


def position_of(stored: Mapping[str, Any]) -> Position:
    """What :func:`dataclasses.asdict` made of a position."""
    return Position(**{**stored, "rows": RowLedger(**stored["rows"])})


def load_weights(checkpoint: Path, model: Any) -> None:
    """Put the weights back, before an engine shards them.

    Raises:
        ArtifactError: A file is damaged, or the weights are those of another model.
    """
    with readable(checkpoint):
        _copy_weights(checkpoint, dict(trainable(model)), Shards(checkpoint, "weights"))


def load_progress(checkpoint: Path, engine: Engine) -> None:
    """Put the optimizer and the random generators back.

    On another number of ranks than before, the generators of those that are new start anew: only
    dropout notices.

    Raises:
        ArtifactError: A file is damaged.
    """
    import torch

    with readable(checkpoint):
        kept = Shards(checkpoint, "optimizer")
        numbers = json.loads((checkpoint / "numbers.json").read_text())
        by_name: dict[str, list[str]] = {}
        for key in (*kept.names, *numbers):
            by_name.setdefault(key.rpartition("/")[0], []).append(key)

        def of(name: str) -> Mapping[str, Any]:
            return {
                key.rpartition("/")[2]: numbers[key] if key in numbers else kept[key]
                for key in by_name.get(name, ())
            }

        engine.restore(of)
        own = checkpoint / f"random-{engine.ranks.rank:02d}.pt"
        if own.exists():
            _restore_torch_generators(torch.load(own, weights_only=True))
    _restore_plain_generators(_state(checkpoint)["generators"])


def _state(checkpoint: Path) -> dict[str, Any]:
    with readable(checkpoint):
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
        return state


def restore_log(checkpoint: Path, ctx: StageContext) -> None:
    """Log again what was logged before the checkpoint, so that file and tracked run are whole."""
    saved = checkpoint / "metrics.jsonl"
    if not saved.exists():
        return
    with readable(checkpoint):
        lines = [json.loads(line) for line in saved.read_text().splitlines()]
    for line in lines:
        ctx.log(line["step"], **line["metrics"])
    shutil.copyfile(saved, ctx.output / "metrics.jsonl")  # with the times at which it happened


def trim_log(checkpoint: Path | None, step: int, ctx: StageContext) -> None:
    """Within one run: forget what was logged after ``step``, for it is done again, but for memory that ran out.

    Args:
        checkpoint: What the run goes on from; it gets the log if its writer had none.
        step: Optimizer steps done.
        ctx: Of the rank that logs.
    """
    log = ctx.output / "metrics.jsonl"
    if not ctx.speaks or not log.exists():
        return
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if _stays(json.loads(line), step)))
    if checkpoint is not None and not (checkpoint / log.name).exists():
        shutil.copyfile(log, checkpoint / log.name)


def _stays(line: dict[str, Any], step: int) -> bool:
    return bool(line["step"] <= step or "out_of_memory" in line["metrics"])


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".part")


def _copy_weights(checkpoint: Path, into: dict[str, Any], weights: Shards) -> None:
    import torch

    if into.keys() != set(weights.names):
        differing = sorted(into.keys() ^ set(weights.names))
        raise unusable(checkpoint, f"{len(differing)} weights differ by name, e.g. {differing[0]}")
    with torch.no_grad():
        for name, weight in into.items():
            stored = weights[name]
            if weight.shape != stored.shape:
                shapes = f"{tuple(stored.shape)} there, {tuple(weight.shape)} in the model"
                raise unusable(checkpoint, f"{name} has shape {shapes}")
            weight.copy_(stored)


def _torch_generators() -> dict[str, Any]:
    import torch

    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _plain_generators() -> dict[str, Any]:
    import numpy as np

    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def _restore_torch_generators(states: dict[str, Any]) -> None:
    import torch

    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])


def _restore_plain_generators(plain: dict[str, Any]) -> None:
    import numpy as np

    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(plain["numpy"]))
