"""``export``: a self-contained folder of the merged model or of the adapter alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from toolkit.recipe.base import Section
from toolkit.stages import Kind, StageContext, StageResult


class ExportConfig(Section):
    """What decides the exported bytes."""

    format: Literal["adapter", "merged"]
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    method: Literal["lora", "qlora", "full"] = "lora"
    """How it was trained: after ``qlora`` the merge is into the dequantized base that training saw."""
    card: dict[str, object] = {}
    """Recipe values that the model card states."""


class Export:
    """Inputs ``model`` (base), ``adapter`` (what train wrote), ``dataset``. Writes the folder."""

    name: ClassVar[str] = "export"
    produces: ClassVar[Kind] = Kind.model
    revision: ClassVar[int] = 1
    environment: ClassVar[str] = "train"

    def run(self, config: ExportConfig, ctx: StageContext) -> StageResult:
        """Merge or copy."""
        raise NotImplementedError
