"""``fetch``: bring the base model here as one plain folder."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

from toolkit.models import folder
from toolkit.models.sources import SOURCES, local_path
from toolkit.recipe.base import Section
from toolkit.recipe.model import parse_source
from toolkit.stages import Kind, StageContext, StageResult


class FetchConfig(Section):
    """What decides the bytes of the base model."""

    source: str
    revision: str | None = None
    sha256: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    digests: dict[str, str] = {}
    """sha256 of every local file that is read, by the path the recipe gives."""


class Fetch:
    """No inputs. Writes a model folder that stands alone: weights, tokenizer, chat template, ``reference.json``."""

    name: ClassVar[str] = "fetch"
    produces: ClassVar[Kind] = Kind.model
    revision: ClassVar[int] = 3
    environment: ClassVar[str] = "train"

    def run(self, config: FetchConfig, ctx: StageContext) -> StageResult:
        """Download or convert the base model, and make the folder complete.

        Raises:
            ModelError: The model cannot be brought here, or is not what the recipe says.
            NotInstalledError: The source needs a package or program that is missing.
        """
        source = parse_source(config.source)
        SOURCES[source.kind](source, config, ctx)
        override = local_path(config.chat_template, ctx) if config.chat_template else None
        if folder.set_template(ctx.output, override) is None:
            ctx.note("the model has no chat template: conversations need model.chat_template")
        folder.set_generation_config(ctx.output)
        folder.set_modes(ctx.output)
        facts = folder.describe(ctx.output) | {
            "source": config.source,
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        _remember(config, ctx)
        millions = facts["parameters"] / 1e6
        ctx.note(f"{facts['architecture']}, {millions:.0f} M parameters, {facts['dtype']}")
        return StageResult(metrics={"parameters": facts["parameters"]}, facts=facts)


def _remember(config: FetchConfig, ctx: StageContext) -> None:
    """Write down what the training side makes of the base, for the proofs before it is served."""
    from toolkit.proof import training_side
    from toolkit.train.model import use_cores

    if importlib.util.find_spec("torch") is None:
        ctx.note(
            "no reference.json: this environment has no torch to compute what a server must agree with"
        )
        return
    use_cores()
    ctx.note("writing reference.json: tokens and logprobs that a server must agree with")
    made = training_side.of_base(ctx.output, ctx.device, trust_remote_code=config.trust_remote_code)
    if made.not_scored:
        ctx.note(
            f"no logprobs are stored, so serving cannot be held against them: {made.not_scored}"
        )
