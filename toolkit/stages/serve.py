"""``serve``: start the real engine, ask it, stop it: the proof that a model can be served."""

from __future__ import annotations

from typing import ClassVar

from toolkit.recipe.base import Section
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Kind, StageContext, StageResult


class ServeConfig(Section):
    """What decides the answers."""

    subject: str
    name: str
    serve: ServeSection
    max_length: int
    system: str | None = None
    """System prompt for questions that bring none."""
    digests: dict[str, str] = {}
    """Digest of every adapter folder of ``serve.adapters``."""


class Serve:
    """Inputs ``model`` and perhaps ``adapter``, ``dataset``. Writes ``answers.json, engine.log, startup.json``."""

    name: ClassVar[str] = "serve"
    produces: ClassVar[Kind] = Kind.report
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "core"

    def run(self, config: ServeConfig, ctx: StageContext) -> StageResult:
        """Start, wait until healthy, ask every question over the OpenAI API, stop."""
        raise NotImplementedError
