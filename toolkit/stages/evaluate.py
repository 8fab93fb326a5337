"""``evaluate``: how good one model is on the held-out rows."""

from __future__ import annotations

from typing import ClassVar, Literal

from toolkit.recipe.base import Section
from toolkit.recipe.evaluate import LmEvalSection
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Kind, StageContext, StageResult


class EvaluateConfig(Section):
    """What decides the scores of one model."""

    subject: str
    metrics: tuple[str, ...]
    max_rows: int
    max_new_tokens: int
    batch_size: int
    max_length: int
    through: Literal["transformers", "engine"]
    engine: ServeSection | None = None
    """How to serve, with ``through: engine`` or ``lm_eval``."""
    lm_eval: LmEvalSection | None = None
    digests: dict[str, str] = {}
    """sha256 of the user's metric files."""


class Evaluate:
    """Inputs ``model``, ``dataset`` and perhaps ``adapter``. Writes ``rows.jsonl`` and ``report.json``."""

    name: ClassVar[str] = "evaluate"
    produces: ClassVar[Kind] = Kind.report
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "quantize"

    def run(self, config: EvaluateConfig, ctx: StageContext) -> StageResult:
        """Generate an answer to every held-out row and score it."""
        raise NotImplementedError
