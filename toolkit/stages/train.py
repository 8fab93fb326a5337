"""``train``: supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from toolkit.recipe.base import Section
from toolkit.recipe.train import TrainSection
from toolkit.stages import Kind, StageContext, StageResult


class TrainConfig(Section):
    """What decides the trained weights."""

    train: TrainSection
    max_length: int
    seed: int


class Train:
    """Inputs ``model`` and ``dataset``. Writes a PEFT adapter (lora, qlora) or a model folder (full)."""

    name: ClassVar[str] = "train"
    produces: ClassVar[Kind] = Kind.adapter
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "train"

    def run(self, config: TrainConfig, ctx: StageContext) -> StageResult:
        """Train."""
        raise NotImplementedError
