"""``reference``: what the training side makes of an adapter from elsewhere, so that serving can be held against it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import ClassVar

from toolkit.errors import PreflightError
from toolkit.recipe.base import Section
from toolkit.recipe.paths import resolve_path
from toolkit.stages import Kind, StageContext, StageResult

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class ReferenceConfig(Section):
    """Which adapter."""

    name: str
    path: str
    """Folder as the recipe names it."""
    digests: dict[str, str]
    """Of that folder."""


class Reference:
    """Inputs ``model`` (the complete base under it), perhaps ``dataset``.

    Writes the adapter as it is, the tokenizer and template of the base, and ``reference.json``.
    """

    name: ClassVar[str] = "reference"
    produces: ClassVar[Kind] = Kind.adapter
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "train"

    def run(self, config: ReferenceConfig, ctx: StageContext) -> StageResult:
        """Let transformers and PEFT compute what the adapter answers.

        Raises:
            PreflightError: The folder is no adapter with safetensors.
        """
        source = resolve_path(config.path, ctx.recipe_dir)
        _copy(source, config, ctx)
        why = _remember(ctx)
        if why:
            ctx.note(f"{config.name}: no logprobs are stored: {why}")
        return StageResult(facts={"adapter": config.name, "not_scored": why})


def _copy(source: Path, config: ReferenceConfig, ctx: StageContext) -> None:
    """Weights and settings byte for byte; all else is the base's, because all adapters are served with its template."""
    from toolkit.models.folder import copy_companions

    missing = [name for name in ADAPTER if not (source / name).is_file()]
    if missing:
        raise PreflightError(
            f"adapter {config.name!r}: {source} has no {' and no '.join(missing)}",
            "give the folder that PEFT wrote, with safetensors",
        )
    for name in ADAPTER:
        shutil.copyfile(source / name, ctx.output / name)
    base, template = ctx.inputs["model"].path, "chat_template.jinja"
    copy_companions(base, ctx.output)
    own, served = source / template, base / template
    if own.is_file() and not (served.is_file() and own.read_bytes() == served.read_bytes()):
        ctx.note(f"{config.name} brings another chat template than its base: the base's is served")


def _remember(ctx: StageContext) -> str | None:
    """Write ``reference.json``; why there are no logprobs in it, if so."""
    from toolkit.proof import training_side
    from toolkit.train.model import use_cores

    if importlib.util.find_spec("torch") is None:
        return "this environment has no torch"
    use_cores()
    ctx.note("writing reference.json: tokens and logprobs that a server must agree with")
    model = ctx.inputs["model"]
    return training_side.of_foreign_adapter(
        ctx.output,
        model.path,
        dataset=ctx.inputs["dataset"].path if "dataset" in ctx.inputs else None,
        device=ctx.device,
        trust_remote_code=model.trusts_code,
    ).not_scored
