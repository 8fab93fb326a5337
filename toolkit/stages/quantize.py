"""``quantize``: a smaller copy of a model that an engine loads natively."""

from __future__ import annotations

from typing import ClassVar

from toolkit.recipe.base import Section
from toolkit.recipe.quantize import QuantizeSection
from toolkit.stages import Kind, StageContext, StageResult


class QuantizeConfig(Section):
    """What decides the quantized bytes."""

    quantize: QuantizeSection
    max_length: int
    seed: int


class Quantize:
    """Inputs ``model`` and, when the recipe has data, ``dataset``. Writes a model folder and ``quantization.json``."""

    name: ClassVar[str] = "quantize"
    produces: ClassVar[Kind] = Kind.model
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "quantize"

    def run(self, config: QuantizeConfig, ctx: StageContext) -> StageResult:
        """Calibrate, quantize, save, report."""
        raise NotImplementedError
