"""The real ``train`` stage under its worker: data, logs, checkpoints, MLflow, everything.

What it costs is its steps against the bare ones of ``subjects/ours.py``. The worker is this
process, as ``toolkit run`` would be; the stage is one of its own, as always.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sqlite3
import statistics
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.train import rows
from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock
from benchmarks.train.shapes import SHAPES
from benchmarks.train.subjects import ours

INJECTED = Path(__file__).parents[1] / "inject"
ROOT = Path(__file__).parents[3]


def measure(case: Case, batch: int, folder: Path, clock: Clock) -> None:
    """Run the step, and read its times from the ``metrics.jsonl`` that it leaves."""
    from toolkit.worker import run_step

    scratch = clock.file.with_suffix("")
    shutil.rmtree(scratch, ignore_errors=True)
    spec = step(case, batch, folder, scratch, clock)
    events: list[tuple[float, str]] = []

    def show(_step: str, event: Mapping[str, Any]) -> None:
        if event["event"] != "tick":
            events.append((time.time(), str(event["event"])))

    began = time.time()
    made = run_step(spec, show)
    ended = time.time()
    lines = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    stamps = [line["time"] for line in lines if "loss" in line["metrics"]]
    clock.facts |= {
        "mlflow": find_spec("mlflow") is not None,
        "metrics_in_mlflow": in_mlflow(scratch / "mlflow.db"),
        "seconds_to_first_step": round(stamps[0] - began, 2),
        "seconds_after_last_step": round(ended - stamps[-1], 2),
        "checkpoint_every": every(case),
        "stage_metrics": made.metrics,
        "events": len(events),
        **shares(stamps, case.warm, every(case), batch * case.sequence),
    }
    shutil.rmtree(scratch)


def in_mlflow(database: Path) -> int:
    """Logged values that reached the store: proof that it took part."""
    if not database.exists():
        return 0
    with contextlib.closing(sqlite3.connect(database)) as store:
        return int(store.execute("select count(*) from metrics").fetchone()[0])


def every(case: Case) -> int:
    """Two checkpoints in a run."""
    return max(2, (case.warm + case.steps) // 3)


def shares(stamps: list[float], warm: int, checkpoint_every: int, tokens: int) -> dict[str, Any]:
    """Seconds of a step, and of a checkpoint.

    A step's loss is logged before its checkpoint is written: the checkpoint of step k is in the
    time between k and k + 1.

    Args:
        stamps: When each step was logged.
        warm: Steps that are not counted.
        checkpoint_every: Steps between two checkpoints.
        tokens: Of one step.
    """
    seconds = [b - a for a, b in itertools.pairwise(stamps)]
    numbered = list(enumerate(seconds, start=1))[max(0, warm - 1) :]
    after = [s for done, s in numbered if done % checkpoint_every == 0]
    plain = [s for done, s in numbered if done % checkpoint_every]
    mean = statistics.mean(plain)
    return {
        "step_s": [round(s, 4) for s in plain],
        "step_mean_s": round(mean, 4),
        "checkpoint_s": round(statistics.mean(after) - mean, 3) if after else None,
        "tokens_per_s": round(tokens / mean, 1),
        "tokens_per_step": tokens,
    }


def step(case: Case, batch: int, folder: Path, scratch: Path, clock: Clock) -> Any:
    """A resolved step with a model and a dataset as its inputs, as the plan would write it."""
    import torch

    from toolkit.tracking import Store
    from toolkit.worker import StepSpec

    config, unknown = ours.section(case, batch)
    if unknown:
        clock.facts["settings_not_in_this_commit"] = unknown
    changes = {"max_steps": clock.total, "checkpoint_every": every(case), "evaluate_rows": 2}
    section = json.loads(config.model_copy(update=changes).model_dump_json())
    pythonpath = [str(INJECTED)] + [
        p for p in sys.path if p and not p.startswith((sys.prefix, sys.base_prefix))
    ]
    variables = {
        k: v for k, v in os.environ.items() if k.startswith(("TORCH", "TRITON", "PYTORCH", "HF_"))
    }
    here = {
        "python": sys.executable, "pythonpath": pythonpath, "lock": None, "digest": "0",
        "variables": variables | {"BENCHMARK_ROOT": str(ROOT)},
    }  # fmt: skip
    return StepSpec(
        recipe="benchmark", recipe_path=str(scratch / "r.yaml"), recipe_dir=str(scratch),
        step="train", stage="train", kind="adapter", fingerprint="7" * 64, identity={},
        config={"train": section, "max_length": case.sequence, "seed": 7},
        inputs={"model": _model(folder, scratch), "dataset": _dataset(case, batch, scratch, clock.total)},
        artifact=str(_private(scratch / "artifacts") / "train"), state=str(scratch / "state" / "train"),
        device="cuda" if torch.cuda.is_available() else "cpu",
        environments={"train": here, "core": here},
        store=Store(f"sqlite:///{scratch}/mlflow.db", scratch / "mlartifacts", scratch / "outboxes").described(),
        experiment="benchmark", parent_run=None, resume=False,
    )  # fmt: skip


def _private(folder: Path) -> Path:
    from toolkit.workspace import private_folder

    return private_folder(folder)


def _publish(path: Path, kind: str, facts: dict[str, Any]) -> str:
    from toolkit import artifact

    artifact.publish(path, {"schema": 1, "toolkit": "0", "recipe": "benchmark", "step": kind,
                            "stage": kind, "kind": kind, "fingerprint": kind[0] * 64,
                            "identity": {}, "inputs": {}, "environments": {}, "metrics": {},
                            "facts": facts, "seconds": 0.0, "peak_memory_gib": 0.0})  # fmt: skip
    return str(path)


def _model(folder: Path, scratch: Path) -> str:
    from toolkit import artifact

    path = _private(scratch / "artifacts") / "model"
    shutil.copytree(folder, artifact.part_of(path))
    return _publish(path, "model", {"source": "benchmark"})


def _dataset(case: Case, batch: int, scratch: Path, steps: int) -> str:
    from toolkit import artifact

    path = _private(scratch / "artifacts") / "dataset"
    tokens = artifact.part_of(path) / "tokens"
    vocabulary = SHAPES[case.shape].vocab_size
    rows.write_store(tokens / "train", [case.sequence] * (batch * steps), vocabulary)
    rows.write_store(tokens / "heldout", [case.sequence] * 2, vocabulary)
    return _publish(path, "dataset", {})
