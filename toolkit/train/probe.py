"""``toolkit train --probe``: two optimizer steps on the worst batch, measured; nothing is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.errors import PreflightError
from toolkit.forecast import training
from toolkit.stages import StageContext, StageResult
from toolkit.train import expected, sft
from toolkit.train.checkpoint import Position
from toolkit.train.model import Numerics
from toolkit.train.oom import Guard, gpu_bytes
from toolkit.train.order import Step
from toolkit.train.parallel.ranks import Ranks

if TYPE_CHECKING:
    from toolkit.stages.train import TrainConfig

STEPS = 2
"""The optimizer's states exist from the first step on, so the second has the peak."""


def probe(given: TrainConfig, numerics: Numerics, ranks: Ranks, ctx: StageContext) -> StageResult:
    """Train :data:`STEPS` steps whose every micro-batch is the worst of the run.

    Raises:
        StepFailedError: Out of memory; says what took it.
        PreflightError: The forecast already says that it cannot fit, or the objective is not SFT.
    """
    if given.train.objective != "sft":
        raise PreflightError(
            f"--probe measures supervised training, and train.objective is {given.train.objective!r}",
            "run it with train.max_steps: 2 instead",
        )
    config, seed = given.train, given.seed
    times = config.gradient_accumulation * ranks.count
    dataset = ctx.inputs["dataset"].path
    rows = sft.read_rows(dataset, config, Position(micro_batches=times), given.max_length, seed)
    takes = expected.setup_of_run(config, ctx, numerics, rows, ranks)
    expected.say(takes, gpu_bytes(), ctx)
    batch = expected.worst(rows.train, rows.steps, takes)
    size = expected.sizes(rows.train, batch)
    step = Step(0, (batch,) * min(times, 2 * ranks.count))
    engine = sft.build(None, config, numerics, ranks, seed=seed, ctx=ctx)
    guard = Guard(config.model_copy(update={"on_oom": "stop"}), takes, ctx, engine)
    trained, loss = len(step.batches) * size.trained, 0.0
    for done in range(STEPS):
        loss = guard.run(
            step, done, lambda cut: sft.gradients(engine, cut, trained, rows, 0, ctx=ctx)
        )
        engine.update(config.learning_rate)
        ctx.progress(done + 1, STEPS, "steps", loss=f"{loss:.4f}")
    shown = f"{size.sequences} x {size.length} tokens ({size.trained} trained)"
    return StageResult({"loss": loss, **_gib(_peaks())}, _facts(takes, _peaks(), shown))


def _peaks() -> dict[str, int]:
    """Bytes: by tensors, by the allocator, and on the device: CUDA's context and other programs among them."""
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
        "reserved_bytes": peaks.get("reserved"),
        "gpu_bytes": gpu_bytes(),
    }
