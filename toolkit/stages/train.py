"""``train``: supervised fine-tuning, or another objective."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from toolkit.recipe.base import Section
from toolkit.recipe.train import TrainSection
from toolkit.stages import Kind, StageContext, StageResult

if TYPE_CHECKING:
    from toolkit.train.model import Numerics
    from toolkit.train.sft import Outcome


class TrainConfig(Section):
    """What decides the trained weights."""

    train: TrainSection
    max_length: int
    seed: int
    digests: dict[str, str] = {}
    """sha256 of the files that hold rewards, by the path the recipe gives."""


class Train:
    """Inputs ``model`` and ``dataset``. Writes a PEFT adapter, or with ``full`` a model folder.

    Beside the weights: tokenizer and chat template, ``metrics.jsonl``, ``loss.png``.
    """

    name: ClassVar[str] = "train"
    produces: ClassVar[Kind] = Kind.adapter
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "train"

    def run(self, config: TrainConfig, ctx: StageContext) -> StageResult:
        """Train, prove that the adapter acts, and write the folder.

        Raises:
            DataError: No row has a trained token, or one is longer than ``max_length``.
            PreflightError: A target of the adapter is not in the model.
            StepFailedError: The loss is not finite, the adapter does nothing, or SIGTERM came.
        """
        from toolkit.models.folder import copy_companions
        from toolkit.train import curves
        from toolkit.train.model import numerics_for, use_cores
        from toolkit.train.objectives import OBJECTIVES

        use_cores()
        numerics = numerics_for(config.train, ctx.device)
        fine_tune = OBJECTIVES[config.train.objective]
        outcome = fine_tune(config.train, config.max_length, config.seed, numerics, ctx)
        effect = None if config.train.method == "full" else _effect(outcome.model, ctx)
        _save(outcome.model, config.train.method, ctx.output)
        copy_companions(ctx.inputs["model"].path, ctx.output)
        position = outcome.position
        title = f"{config.train.method} · {position.step} steps · {position.rows.seen} rows"
        image = ctx.output / "loss.png"
        curves.draw(ctx.output / "metrics.jsonl", image, title, config.train.objective)
        metrics = _metrics(outcome, effect)
        return StageResult(metrics, _facts(config, numerics, outcome, metrics, ctx))


def _effect(model: Any, ctx: StageContext) -> float:
    from toolkit.data.store import TokenStore
    from toolkit.train.batches import rows_with_targets
    from toolkit.train.effect import adapter_effect

    store = TokenStore(ctx.inputs["dataset"].path / "tokens" / "train")
    return adapter_effect(model, store[(rows_with_targets(store) or [0])[0]])


def _save(model: Any, method: str, output: Path) -> None:
    if method == "full":
        model.config.use_cache = True
        model.save_pretrained(output)
        return
    # embeddings are frozen: never a copy of them in the adapter, which no engine would load
    model.save_pretrained(output, save_embedding_layers=False)
    (output / "README.md").unlink(
        missing_ok=True
    )  # the library's empty form; export writes a card with content


def _metrics(outcome: Outcome, effect: float | None) -> dict[str, float]:
    import torch

    position = outcome.position
    metrics = {
        "final_loss": outcome.final_loss,
        "heldout_loss": outcome.heldout_loss,
        "tokens_per_second": position.tokens / position.seconds,
        "tokens": position.tokens,
        "trained_tokens": position.trained_tokens,
        "steps": position.step,
        "rows_seen": position.rows.seen,
        "adapter_effect": effect,
        **outcome.scores,
    }
    if torch.cuda.is_available():
        metrics["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {
        name: float(value)
        for name, value in metrics.items()
        if value is not None and math.isfinite(value)
    }


def _facts(
    config: TrainConfig,
    numerics: Numerics,
    outcome: Outcome,
    metrics: dict[str, float],
    ctx: StageContext,
) -> dict[str, Any]:
    from toolkit.train.folder import base_id

    base = ctx.inputs["model"]
    facts: dict[str, Any] = {
        "method": config.train.method,
        "objective": config.train.objective,
        "base": base_id(base.path, base.facts),
        "base_fingerprint": base.fingerprint,
        "trained_on": numerics.trained_on,
        "precision": numerics.precision,
        "max_length": config.max_length,
        "row_order": outcome.position.rows.digest,
        "metrics": metrics,
    }
    if config.train.method != "full":
        lora = outcome.model.peft_config["default"]
        facts |= {
            "rank": lora.r,
            "alpha": lora.lora_alpha,
            "rslora": lora.use_rslora,
            "targets": sorted(lora.target_modules),
        }
    return facts
