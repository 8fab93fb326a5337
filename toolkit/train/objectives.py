"""What ``train.objective`` names: every one is a function with the signature of ``sft.fine_tune``."""

from __future__ import annotations

from toolkit.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {name: f"toolkit.train.{name}:fine_tune" for name in ("sft", "dpo", "kto", "orpo", "grpo")},
)
