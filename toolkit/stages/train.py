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
    from toolkit.train.parallel.engine import Engine
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

    Beside the weights: tokenizer and chat template, ``metrics.jsonl``, ``loss.png`` and the pictures
    of ``train/watch/plots.py``, and ``profile/`` where steps were recorded.
    """

    name: ClassVar[str] = "train"
    produces: ClassVar[Kind] = Kind.adapter
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "train"

    def run(self, config: TrainConfig, ctx: StageContext) -> StageResult:
        """Train, prove that the adapter acts, and write the folder.

        With several ranks each runs this; the first one logs and writes.

        Raises:
            DataError: No row has a trained token, or one is longer than ``max_length``.
            PreflightError: A target of the adapter is not in the model.
            StepFailedError: Loss or weights are not finite, the adapter does nothing, or SIGTERM came.
        """
        from toolkit.train.model import numerics_for, use_cores
        from toolkit.train.objectives import OBJECTIVES
        from toolkit.train.parallel.ranks import Ranks
        from toolkit.train.probe import probe

        use_cores()
        with Ranks.here(ctx.device) as ranks:
            if not ranks.first:
                ctx = ctx.silent()
            numerics = numerics_for(config.train, ctx.device)
            if ctx.probe:
                return probe(config, numerics, ranks, ctx)
            outcome = OBJECTIVES[config.train.objective](
                config.train, config.max_length, config.seed, numerics, ranks=ranks, ctx=ctx
            )
            full = config.train.method == "full"
            effect = None if full else _effect(outcome.engine, ctx)
            _save(outcome.engine, config.train.method, ctx.output)
            metrics = _metrics(outcome, effect)
            if ranks.first:
                _beside_the_weights(config, outcome, ctx)
            return StageResult(metrics, _facts(config, numerics, outcome, metrics, ctx))


def _effect(engine: Engine, ctx: StageContext) -> float:
    from toolkit.data.store import TokenStore
    from toolkit.train import start
    from toolkit.train.batches import rows_with_targets
    from toolkit.train.effect import adapter_effect

    store = TokenStore(ctx.inputs["dataset"].path / "tokens" / "train")
    row = store[(rows_with_targets(store) or [0])[0]]
    return adapter_effect(engine, row, start.found(ctx.state))


def _save(engine: Engine, method: str, output: Path) -> None:
    """Gather the trained weights on the first rank, which writes them."""
    from toolkit.train.finite import insist_on_numbers

    trained, finite = {}, {}
    for name, weight in engine.weights():  # all ranks gather, one keeps
        finite[name] = bool(weight.isfinite().all())
        if engine.ranks.first:
            trained[name] = weight.cpu()
    insist_on_numbers(finite)
    if not engine.ranks.first:
        return
    model = engine.model
    if method == "full":
        model.config.use_cache = True
        kept = dict(model.named_buffers())
        buffers = {name: kept[name] for name in model.state_dict() if name in kept}
        model.save_pretrained(output, state_dict=trained | buffers)
        return
    # embeddings are frozen: never a copy of them in the adapter, which no engine would load
    model.save_pretrained(output, state_dict=trained, save_embedding_layers=False)
    (output / "README.md").unlink(
        missing_ok=True
    )  # the library's empty form; export writes a card with content


def _beside_the_weights(config: TrainConfig, outcome: Outcome, ctx: StageContext) -> None:
    """Tokenizer, template, how the adapter began, a profile, and the curves for people."""
    from toolkit.models.folder import copy_companions
    from toolkit.train import curves, start
    from toolkit.train.watch import plots, profile

    start.keep(ctx.state, ctx.output)
    profile.keep(ctx.state, ctx.output)
    copy_companions(ctx.inputs["model"].path, ctx.output)
    position = outcome.position
    title = f"{config.train.method} · {position.step} steps · {position.rows.seen} rows"
    image = ctx.output / "loss.png"
    curves.draw(ctx.output / "metrics.jsonl", image, title, config.train.objective)
    plots.draw(ctx.output / "metrics.jsonl", ctx.output, title)


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
        **outcome.watched,
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
        "parallel": outcome.engine.name,
        "ranks": outcome.engine.ranks.count,
        "effective_batch": config.train.batch_size * outcome.position.micro_batches,
        "metrics": metrics,
    }
    if config.train.method != "full":
        lora = outcome.engine.model.peft_config["default"]
        facts |= {
            "rank": lora.r,
            "alpha": lora.lora_alpha,
            "rslora": lora.use_rslora,
            "dora": lora.use_dora,
            "init": config.train.lora.init,
            "plus_ratio": config.train.lora.plus_ratio,
            "targets": sorted(lora.target_modules),
        }
    return facts
