"""``export``: a self-contained folder of the merged model or of the adapter alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import sqrt
from typing import Any, ClassVar, Literal

from pydantic import Field

from toolkit.errors import PreflightError
from toolkit.recipe.base import Section
from toolkit.stages import Kind, StageContext, StageResult


class ExportConfig(Section):
    """What decides the exported bytes."""

    format: Literal["adapter", "merged"]
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    method: Literal["lora", "qlora", "full"] = "lora"
    """How it was trained: after ``qlora`` the merge is into the dequantized base."""
    card: dict[str, object] = Field(default_factory=dict)
    """Recipe values that the model card states."""


class Export:
    """Inputs ``model`` (base), ``adapter`` (what train wrote), ``dataset``. Writes the folder."""

    name: ClassVar[str] = "export"
    produces: ClassVar[Kind] = Kind.model
    revision: ClassVar[int] = 3
    environment: ClassVar[str] = "train"

    def run(self, config: ExportConfig, ctx: StageContext) -> StageResult:
        """Merge or copy; an adapter that took a part of its base into itself is made a plain one.

        Raises:
            PreflightError: An adapter is asked for, but all weights were trained.
            StepFailedError: The merged model, or the converted adapter on its base, is not the trained model.
        """
        if config.method == "full" and config.format == "adapter":
            raise PreflightError(
                "export.formats has 'adapter', but train.method is 'full': there is no adapter",
                "write export.formats: [merged]",
            )
        facts = dict(ctx.inputs["adapter"].facts) | {
            "method": config.method,
            "base": _base(config, ctx),
            "trust_remote_code": ctx.inputs["model"].trusts_code,
        }
        if config.format == "adapter":
            dtype, metrics = "fp32", _adapter(facts, ctx)
            facts |= {"converted_from": facts["init"], **_plain(facts)} if metrics else {}
        elif config.method == "full":
            dtype, metrics = config.dtype, _full(config, ctx)
        else:
            dtype, metrics = config.dtype, _merged(config, facts, ctx)
        _write_card(config, dtype, facts, metrics, ctx)
        kept = {key: facts[key] for key in _KEPT if key in facts}
        return StageResult(metrics, kept | {"format": config.format, "dtype": dtype} | metrics)


_KEPT = (
    "method",
    "base",
    "base_fingerprint",
    "trained_on",
    "rank",
    "alpha",
    "rslora",
    "dora",
    "init",
    "plus_ratio",
    "converted_from",
    "targets",
    "max_length",
    "trust_remote_code",
)


def _base(config: ExportConfig, ctx: StageContext) -> str:
    """Name of the base for people and hubs: the recipe's source unless that is a path."""
    from toolkit.train.folder import base_id

    model = ctx.inputs["model"]
    return base_id(model.path, {"source": config.card.get("base")} | dict(model.facts))


def _adapter(facts: Mapping[str, Any], ctx: StageContext) -> dict[str, float]:
    from toolkit.models.folder import copy_companions
    from toolkit.proof import training_side
    from toolkit.train.model import use_cores

    use_cores()
    metrics = _converted(facts, ctx) if _is_pissa(facts) else _copied(ctx)
    settings = ctx.output / "adapter_config.json"
    named = json.loads(settings.read_text()) | {"base_model_name_or_path": facts["base"]}
    settings.write_text(json.dumps(named, indent=2, sort_keys=True) + "\n")
    model = ctx.inputs["model"]
    copy_companions(model.path, ctx.output)
    ctx.note("writing reference.json: tokens and logprobs that a server must agree with")
    training_side.of_adapter(
        ctx.output,
        model.path,
        facts=facts,
        dataset=ctx.inputs["dataset"].path,
        device=ctx.device,
        trust_remote_code=model.trusts_code,
    )
    return metrics


def _is_pissa(facts: Mapping[str, Any]) -> bool:
    return str(facts.get("init")).startswith("pissa")


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the plain adapter is that a PiSSA adapter was made."""
    rank, alpha = facts["rank"], facts["alpha"]
    scale = alpha / (sqrt(rank) if facts["rslora"] else rank)
    return {"rank": 2 * rank, "alpha": scale * 2 * rank, "rslora": False}


def _copied(ctx: StageContext) -> dict[str, float]:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(ctx.inputs["adapter"].path / name, ctx.output / name)
    return {}


def _converted(facts: Mapping[str, Any], ctx: StageContext) -> dict[str, float]:
    from toolkit.train.convert import convert

    ctx.note(f"converting the adapter: {facts['init']} changed its base")
    found = convert(
        ctx.inputs["model"].path,
        ctx.inputs["adapter"].path,
        ctx.output,
        precision=facts["precision"],
        row=_probe(ctx),
        device=ctx.device,
        trust_remote_code=ctx.inputs["model"].trusts_code,
    )
    ctx.note(
        f"a plain adapter of rank {found.rank}; a logit differs by {found.error:.2g} at most "
        f"from the trained model's, allowed is {found.tolerance:.2g}"
    )
    return {"conversion_error": found.error, "conversion_tolerance": found.tolerance}


def _full(config: ExportConfig, ctx: StageContext) -> dict[str, float]:
    from toolkit.models.folder import copy_companions
    from toolkit.proof import training_side
    from toolkit.train.folder import store_as

    ctx.note(f"storing all weights as {config.dtype}")
    store_as(ctx.inputs["adapter"].path, ctx.output, config.dtype)
    copy_companions(ctx.inputs["model"].path, ctx.output)
    training_side.of_model(
        ctx.output,
        dataset=ctx.inputs["dataset"].path,
        device=ctx.device,
        trust_remote_code=ctx.inputs["model"].trusts_code,
    )
    return {}


def _merged(config: ExportConfig, facts: Mapping[str, Any], ctx: StageContext) -> dict[str, float]:
    from toolkit.proof.recorder import Recorder
    from toolkit.train.merge import merge
    from toolkit.train.model import use_cores

    use_cores()
    base, adapter = ctx.inputs["model"], ctx.inputs["adapter"]
    ctx.note(f"merging in float32, storing as {config.dtype}")
    recorder = Recorder(base.path, ctx.inputs["dataset"].path, trust_remote_code=base.trusts_code)
    report = merge(
        base.path,
        adapter.path,
        ctx.output,
        facts=facts,
        dtype=config.dtype,
        row=_probe(ctx),
        device=ctx.device,
        trust_remote_code=base.trusts_code,
        recorder=recorder,
    )
    recorder.write(
        ctx.output,
        "model",
        precision="fp32",
        trained_on=facts.get("trained_on"),
    )
    ctx.note(f"adapter and merged model differ by {report.merge_error:.2g} in a logit")
    return {
        "merge_error": report.merge_error,
        "stored_error": report.stored_error,
        "stored_agreement": report.stored_agreement,
    }


def _probe(ctx: StageContext) -> Any:
    """A row to compare models on: held-out if there is one."""
    from toolkit.data.store import TokenStore

    tokens = ctx.inputs["dataset"].path / "tokens"
    heldout = TokenStore(tokens / "heldout")
    return heldout[0] if len(heldout) else TokenStore(tokens / "train")[0]


def _write_card(
    config: ExportConfig,
    dtype: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    ctx: StageContext,
) -> None:
    from toolkit.train.card import model_card

    numbers = dict(facts.get("metrics", {})) | dict(metrics)
    (ctx.output / "README.md").write_text(
        model_card(config.format, dtype, facts, numbers, config.card)
    )
