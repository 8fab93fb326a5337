"""Checkpoints: everything a run needs to go on to the same result, complete or absent.

::

    checkpoints/step-00000050/
    ├── weights.safetensors   trainable weights
    ├── optimizer.pt          state of the optimizer
    ├── random.pt             torch's generators (CPU, every GPU)
    ├── state.json            position, ledger, counters, generators of Python and numpy
    └── metrics.jsonl         what was logged so far
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from toolkit.errors import ArtifactError
from toolkit.stages import StageContext
from toolkit.train.model import trainable
from toolkit.train.order import RowLedger

KEPT = 2


@dataclass
class Position:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    rows: RowLedger = field(default_factory=RowLedger)
    tokens: int = 0  # seen, without padding
    trained_tokens: int = 0
    seconds: float = 0.0  # in steps, without evaluation and checkpoints


def save(folder: Path, model: Any, optimizer: Any, position: Position, metrics: Path) -> Path:
    """Write a checkpoint, then drop all but the newest :data:`KEPT`; return its folder."""
    import torch
    from safetensors.torch import save_file

    final = folder / f"step-{position.step:08d}"
    part = folder / f"{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {name: weight.detach().contiguous() for name, weight in trainable(model)}
    save_file(weights, part / "weights.safetensors")
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    torch.save(_torch_generators(), part / "random.pt")
    state = {"position": asdict(position), "generators": _plain_generators()}
    (part / "state.json").write_text(json.dumps(state))
    if metrics.exists():
        shutil.copyfile(metrics, part / "metrics.jsonl")
    _flush(part)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in _complete(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load(checkpoint: Path, model: Any, optimizer: Any) -> Position:
    """Put model, optimizer and random generators back to where the checkpoint was.

    Raises:
        ArtifactError: A file is damaged, or the weights are those of another model.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((checkpoint / "state.json").read_text())
        weights = load_file(checkpoint / "weights.safetensors")
        optimizer_state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        generators = torch.load(checkpoint / "random.pt", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        raise _unusable(checkpoint, str(error)) from error
    _copy_weights(checkpoint, dict(trainable(model)), weights)
    optimizer.load_state_dict(optimizer_state)
    _restore_generators(generators, state["generators"])
    position = state["position"]
    return Position(**(position | {"rows": RowLedger(**position["rows"])}))


def restore_log(checkpoint: Path, ctx: StageContext) -> None:
    """Log again what was logged before the checkpoint, so that file and tracked run are whole."""
    saved = checkpoint / "metrics.jsonl"
    if not saved.exists():
        return
    for line in map(json.loads, saved.read_text().splitlines()):
        ctx.log(line["step"], **line["metrics"])
    shutil.copyfile(saved, ctx.output / "metrics.jsonl")  # with the times at which it happened


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".part")


def _copy_weights(checkpoint: Path, into: dict[str, Any], weights: dict[str, Any]) -> None:
    import torch

    if into.keys() != weights.keys():
        differing = sorted(into.keys() ^ weights.keys())
        raise _unusable(checkpoint, f"{len(differing)} weights differ by name, e.g. {differing[0]}")
    with torch.no_grad():
        for name, weight in into.items():
            if weight.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)} there, {tuple(weight.shape)} in the model"
                raise _unusable(checkpoint, f"{name} has shape {shapes}")
            weight.copy_(weights[name])


def _unusable(checkpoint: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"checkpoint {checkpoint} cannot be used: {why}",
        f"remove it to go on from an older checkpoint, or {checkpoint.parent} to start anew",
    )


def _torch_generators() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _plain_generators() -> dict[str, Any]:
    import numpy as np

    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def _restore_generators(torch_states: dict[str, Any], plain: dict[str, Any]) -> None:
    import numpy as np
    import torch

    torch.set_rng_state(torch_states["cpu"])
    if torch_states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(torch_states["cuda"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(plain["numpy"]))


def _flush(folder: Path) -> None:
    """Bring all bytes to the disk, so that a power cut after the rename leaves nothing hollow."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
