"""``toolkit train --probe``: two optimizer steps on the worst batch, measured; nothing is kept."""

from __future__ import annotations

from typing import Any

from toolkit.forecast import training
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext, StageResult
from toolkit.train import expected, sft
from toolkit.train.model import Numerics, build_model
from toolkit.train.oom import Guard, gpu_bytes
from toolkit.train.optimizer import build_optimizer
from toolkit.train.order import Step

STEPS = 2
"""The optimizer's states exist from the first step on, so the second has the peak."""


def probe(
    config: TrainSection, max_length: int, seed: int, numerics: Numerics, ctx: StageContext
) -> StageResult:
    """Train :data:`STEPS` steps whose every micro-batch is the worst of the run.

    Raises:
        StepFailedError: Out of memory; says what took it.
        PreflightError: The forecast already says that it cannot fit.
    """
    base = ctx.inputs["model"]
    rows = sft.read_rows(ctx.inputs["dataset"].path, config, max_length, seed)
    takes = expected.setup_of_run(config, base.path, numerics, rows.train, rows.steps)
    expected.say(takes, gpu_bytes(), ctx)
    batch = expected.worst(rows.train, rows.steps, takes)
    step = Step(0, (batch,) * min(2, config.gradient_accumulation))
    sft.seed_everything(seed)
    ctx.note(f"loading the base model ({numerics.trained_on})")
    model = build_model(base.path, config, numerics, ctx.device, base.facts)
    optimizer = build_optimizer(model, config)
    guard = Guard(config.model_copy(update={"on_oom": "stop"}), takes, ctx)
    loss = 0.0
    for done in range(STEPS):
        loss, _, _ = guard.run(
            step,
            done,
            lambda cut: sft.gradients(model, cut, rows, 0, ctx),
            lambda: optimizer.zero_grad(set_to_none=True),
        )
        sft.clip(model, config.max_grad_norm, done, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ctx.progress(done + 1, STEPS, "steps", loss=f"{loss:.4f}")
    size = expected.sizes(rows.train, batch)
    shown = f"{size.sequences} x {size.length} tokens ({size.trained} trained)"
    return StageResult({"loss": loss, **_gib(_peaks())}, _facts(takes, _peaks(), shown))


def _peaks() -> dict[str, int]:
    """Bytes: by tensors, by the allocator, and on the device, the CUDA context among them."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": total - free,
    }


def _gib(peaks: dict[str, int]) -> dict[str, float]:
    return {f"peak_{name}_gib": size / 2**30 for name, size in peaks.items()}


def _facts(takes: training.Setup | None, peaks: dict[str, int], shown: str) -> dict[str, Any]:
    said = training.forecast(takes) if takes else None
    return {
        "batch": shown,
        "parts_bytes": {part.name: part.bytes for part in said.parts} if said else {},
        "total_bytes": said.total if said else None,
        "measured_bytes": peaks.get("device"),
        "gpu_bytes": gpu_bytes(),
    }
