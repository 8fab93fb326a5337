"""GRPO on a GPU with vLLM beside training, and without: does the reward rise, and how long is a step?

::

    python tests/gpu/grpo_with_vllm.py BASE OUT.json [SECONDS]

BASE is the folder of a small chat model (SmolLM2 of the demo will do). The interpreter needs torch,
transformers, peft, accelerate, trl, datasets and a vLLM that TRL supports. Writes OUT.json after every
case; a case that does not fit into SECONDS (300) is not started.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from toolkit.errors import ToolkitError
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.data import Data, DataConfig
from toolkit.stages.train import Train, TrainConfig

REWARD = """
def short(completions):
    return [-len(text.split()) / 32 for text in completions]
"""
STEPS = 20


def main(base: Path, out: Path, seconds: float) -> None:
    """Run every case, the one with vLLM first."""
    root = Path(tempfile.mkdtemp())
    rows = [{"prompt": f"Tell me something about the number {n}."} for n in range(64)]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "r.py").write_text(REWARD)
    model = Input(base, Kind.model, "b" * 64, {"source": "tests/base"})
    data = context(root, "data", {"model": model})
    section = {"sources": [{"path": "a.jsonl"}], "heldout": {"fraction": 0}}
    values = {"data": section, "max_length": 256, "seed": 0}
    Data().run(DataConfig.model_validate(values | {"objective": "grpo", "answer_tokens": 64}), data)
    inputs = {"model": model, "dataset": Input(data.output, Kind.dataset, "d" * 64, {})}
    found: list[dict[str, Any]] = []
    started = time.perf_counter()
    for rollout in ("vllm", "transformers"):
        if time.perf_counter() - started > seconds:
            break
        found.append(case(root, inputs, rollout))
        out.write_text(json.dumps(found, indent=2))
    for one in found:
        print(" | ".join(f"{key} {value}" for key, value in one.items()))


def case(root: Path, inputs: dict[str, Input], rollout: str) -> dict[str, Any]:
    """One run of :data:`STEPS` steps."""
    ctx = context(root, rollout, inputs, device="cuda" if torch.cuda.is_available() else "cpu")
    train = {
        "objective": "grpo",
        "grpo": {
            "rewards": ["r.py:short"],
            "group_size": 8,
            "max_completion_tokens": 64,
            "beta": 0.02,
            "rollout": rollout,
        },
        "max_steps": STEPS,
        "batch_size": 32,
        "learning_rate": 2e-4,
        "checkpoint_every": None,
    }
    started = time.perf_counter()
    try:
        Train().run(TrainConfig.model_validate({"train": train, "max_length": 256, "seed": 0}), ctx)
    except (ToolkitError, RuntimeError, ValueError, ImportError) as error:
        return {"rollout": rollout, "error": f"{type(error).__name__}: {error}"}
    lines = [json.loads(x) for x in (ctx.output / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["metrics"]["reward"] for line in lines if "reward" in line["metrics"]]
    apart = [
        line["metrics"]["sampling_sampling_logp_difference_mean"]
        for line in lines
        if "sampling_sampling_logp_difference_mean" in line["metrics"]
    ]
    times = [line["time"] for line in lines]
    return {
        "rollout": rollout,
        "first_reward": round(sum(rewards[:3]) / 3, 4),
        "last_reward": round(sum(rewards[-3:]) / 3, 4),
        "first_logp_difference": round(sum(apart[:3]) / 3, 4),
        "last_logp_difference": round(sum(apart[-3:]) / 3, 4),
        "seconds_per_step": round((times[-1] - times[2]) / (len(times) - 3), 3),
        "seconds": round(time.perf_counter() - started, 1),
    }


def context(root: Path, name: str, inputs: dict[str, Input], **changes: Any) -> StageContext:
    """A context with folders of its own; what it says goes to stdout."""
    output, state = root / name / "output", root / name / "state"
    output.mkdir(parents=True)
    state.mkdir()
    return StageContext(inputs, output, state, root, events=sys.stdout, **changes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 300)
