"""``choose``: an adapter on a quantized base or the merged model quantized, by what was measured of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Literal

from toolkit.recipe.base import Section
from toolkit.stages import Kind, StageContext, StageResult

SERVE, EVALUATE = "serve-", "evaluate-"
"""How the roles of its inputs begin; the subject follows."""


class ChooseConfig(Section):
    """What decides; see :class:`toolkit.proof.choice.Rivals`."""

    subjects: tuple[str, ...]
    prefer: Literal["measured", "merged", "adapter"]
    metric: str | None = None


class Choose:
    """Inputs ``serve-SUBJECT`` of every subject, and ``evaluate-SUBJECT`` where it is scored.

    Writes ``choice.json``: the subject, why, and the numbers of each.
    """

    name: ClassVar[str] = "choose"
    produces: ClassVar[Kind] = Kind.report
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "core"

    def run(self, config: ChooseConfig, ctx: StageContext) -> StageResult:
        """Read the finished steps' numbers and choose."""
        from toolkit.proof.choice import Rivals, choose, numbers_of

        measured = {
            subject: of
            for name in config.subjects
            for subject, of in numbers_of(
                name, _metrics(ctx, SERVE + name), _metrics(ctx, EVALUATE + name)
            ).items()
        }
        choice = choose(Rivals(config.subjects, config.prefer, config.metric), measured)
        (ctx.output / "choice.json").write_text(json.dumps(asdict(choice), indent=1) + "\n")
        ctx.note(f"{choice.subject}: {choice.why}")
        metrics = {
            f"{subject}.{metric}": value
            for subject, of in choice.numbers.items()
            for metric, value in of.items()
        }
        return StageResult(metrics, {"subject": choice.subject, "why": choice.why})


def _metrics(ctx: StageContext, role: str) -> Mapping[str, float]:
    """The final numbers of a finished step; none where the recipe has no such step."""
    if role not in ctx.inputs:
        return {}
    manifest = json.loads((Path(ctx.inputs[role].path) / "manifest.json").read_text())
    metrics: Mapping[str, float] = manifest["metrics"]
    return metrics
