"""Mistakes that servers are known to make with an adapter, made on purpose, so that a proof can name the one it sees.

Each leaves the adapter loaded and answering, only with other numbers. vLLM 0.26 scales every layer by one ``r`` and
``lora_alpha``; rsLoRA (arXiv:2312.03732) divides alpha by the root of the rank, which servers have overlooked.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

RSLORA = "rsLoRA ignored (alpha / r instead of alpha / sqrt(r))"
PATTERNS = "rank_pattern and alpha_pattern ignored"


def faults(adapted: Any) -> Iterator[str]:
    """Make one mistake after another in a PEFT model; each lasts until the next name is asked for.

    Args:
        adapted: A ``PeftModel`` with one LoRA adapter; as it was when the iteration has ended.
    """
    settings = adapted.peft_config["default"]
    layers = [m for m in adapted.modules() if isinstance(getattr(m, "scaling", None), dict)]
    right = [layer.scaling["default"] for layer in layers]
    try:
        for name, wrong in _scalings(settings, layers).items():
            for layer, scale in zip(layers, wrong, strict=True):
                layer.scaling["default"] = scale
            yield name
    finally:
        for layer, scale in zip(layers, right, strict=True):
            layer.scaling["default"] = scale


def _scalings(settings: Any, layers: list[Any]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    if settings.use_rslora:
        found[RSLORA] = [layer.lora_alpha["default"] / layer.r["default"] for layer in layers]
    if settings.rank_pattern or settings.alpha_pattern:
        divisor = sqrt(settings.r) if settings.use_rslora else settings.r
        found[PATTERNS] = [settings.lora_alpha / divisor] * len(layers)
    return found
