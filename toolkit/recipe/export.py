"""``export:`` the folders that leave training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.recipe.base import Section


class ExportSection(Section):
    """Self-contained folders: weights, tokenizer, exact chat template, generation config, model card."""

    formats: Annotated[tuple[Literal["adapter", "merged"], ...], Field(min_length=1)] = (
        "adapter",
        "merged",
    )
    """`adapter` alone, and `merged` into the base at full precision (also after QLoRA: into the
    dequantized weights that training saw)."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of the merged weights; the merge itself is done in fp32."""
