"""Rules on ``train.base_precision: fp8``: a base that is frozen in the numbers in which it is served."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.preflight.facts import Facts
from toolkit.preflight.verdict import Finding, refuse, rule, warn
from toolkit.recipe import Recipe
from toolkit.recipe.recipe import ON
from toolkit.train.speed.choose import FP8_FROM

QUANTIZED = "{ method: fp8, of: base }"


def _in_fp8(recipe: Recipe) -> bool:
    return recipe.train is not None and recipe.train.base_precision == "fp8"


@rule(
    "train.fp8",
    "a base in FP8 is multiplied on a GPU that can",
    "torch._scaled_mm: compute capability 8.9 (Ada) and from 9.0 on (Hopper, Blackwell)",
    "set train.base_precision: auto, or train.method: qlora for as little memory",
)
def multiplies(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Older GPUs have no products of FP8 numbers; a CPU computes the same numbers slowly."""
    capability = facts.capability
    if not _in_fp8(recipe) or "train" in facts.done or facts.accelerator != "cuda":
        return
    if capability is not None and capability < FP8_FROM:
        yield refuse(
            f"train.base_precision is fp8, and the GPU's compute capability is {capability}: FP8 products begin "
            f"with {FP8_FROM}",
            "set train.base_precision: auto, or train.method: qlora for as little memory",
        )


@rule(
    "train.fp8_served",
    "an adapter that was trained on a base in FP8 is served on that base",
    "models/fp8.py: the FP8 quantizer stores the weights and scales that training rounds to",
    f"write quantize: [{QUANTIZED}] and serve 'tuned@fp8'",
)
def served(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    """Another base is nearly the same model, but not the trained one."""
    if not _in_fp8(recipe) or recipe.train is None:
        return
    same = {f"{ON}{q.label}" for q in recipe.quantize if (q.method, q.of) == ("fp8", "base")}
    if recipe.serve and not same & set(recipe.served):
        yield warn(
            "train.base_precision is fp8, and serve.models has no adapter on the base in FP8: the adapter or its "
            "merge is served in other numbers than it was trained with",
            f"write quantize: [{QUANTIZED}] and serve.models: [tuned@fp8]",
        )
    if (
        same & set(recipe.served if recipe.serve else ())
        and recipe.train.lora.targets != "all-linear"
    ):
        yield warn(
            "train.base_precision is fp8 and train.lora.targets names some linear layers: training rounds those, the "
            "served base rounds all",
            "set train.lora.targets: all-linear",
        )


RULES = (multiplies, served)
