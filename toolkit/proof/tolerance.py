"""How far served logprobs may be from those of the training side, by the precision of what is served.

Measured on 80 tokens of 10 rows of the demo (SmolLM2-135M, LoRA r16, logprobs from -10 up), vLLM 0.32 on a CPU without
AMX, training side in fp32; mean and largest difference in nats, KL in nats per token:

=========================================  ========  ========  ========
served                                     mean      max       KL
=========================================  ========  ========  ========
fp32, base                                 0.00001   0.00004
fp32, adapter                              < 0.0001  < 0.001   < 0.0001
bf16, base                                 0.053     0.23
bf16, adapter                              0.060     0.37      0.0022
W4A16 (GPTQ), beside its own forward       0.089     0.43      0.0028
W4A16 (GPTQ), beside the full model        0.72      3.7       0.21
=========================================  ========  ========  ========

On an H200, vLLM 0.26 and another adapter of the demo, training side in fp32: bf16 base 0.060, adapter 0.064; fp16 base
0.0054, adapter 0.0071. Against a training side in bf16 there: base 0.048 to 0.071, adapter 0.097 (SGLang 0.5.17), 0.108
(vLLM), and 0.108 to 0.114 for vLLM in fp16, so most of it was the training side's own rounding. It computes in fp32
now wherever the model fits.

What is wrong is further away (bf16, adapter): one layer of 30 missing 0.157, alpha 10 % too large 0.26, half of the
layers missing 1.43, rsLoRA ignored 1.40, zero 1.86. ``docs/explanation/proofs.md`` has the whole table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.proof import ProofTarget
from toolkit.proof.reference import Reference


@dataclass(frozen=True)
class Tolerance:
    """Bounds for one precision.

    Attributes:
        mean: Largest mean absolute difference of logprobs, nats per token.
        measured: Whether it was measured, or assumed from its neighbours.
    """

    mean: float
    measured: bool


BY_PRECISION: Mapping[str, Tolerance] = {
    "fp32": Tolerance(0.001, True),
    "fp16": Tolerance(0.02, True),
    "bf16": Tolerance(0.12, True),
    "fp8": Tolerance(0.2, False),
    "int8": Tolerance(0.2, False),
    "int4": Tolerance(0.2, True),
}
"""Beside the forward of the same weights, from fine to coarse: about twice what was measured."""
STORED: Mapping[str, Tolerance] = {"fp16": Tolerance(0.1, False), "bf16": Tolerance(0.2, True)}
"""Where the training side itself had no room for fp32: both sides round."""
ACROSS: Mapping[str, Tolerance] = {
    "fp8": Tolerance(0.5, False),
    "int8": Tolerance(0.5, False),
    "int4": Tolerance(1.5, True),
}
"""Beside the forward of other weights: an adapter whose base was quantized after training, or was rounded for it."""
ORDER = tuple(BY_PRECISION)
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_BITS = {4: "int4", 8: "int8"}
TRAINED = {"nf4": "int4", "fp8": "fp8"}
"""Precision of a base that was rounded for training."""


def bound(target: ProofTarget, reference: Reference, base: str | None = None) -> tuple[float, str]:
    """Tolerance (nats per token) for a folder's stored logprobs, and the precision that it is for.

    Args:
        target: What is served; its recipe's ``serve.proof.tolerance`` wins.
        reference: Of the model or the adapter.
        base: Digest of the weights that are served under an adapter.
    """
    precision = precision_of(target, reference)
    other = base is not None and base != reference.digests.get("base")
    across = (other or reference.trained_on in TRAINED) and precision in ACROSS
    found = ACROSS[precision] if across else BY_PRECISION[precision]
    named = f"{precision} base" if across else precision
    rounded = STORED.get(reference.precision, found)
    return target.settings.tolerance or max(found.mean, rounded.mean), named


def noise_bound(target: ProofTarget) -> float:
    """How far the engine's answers may be from themselves, nats per token."""
    found = BY_PRECISION[served_precision(target.folder, target.dtype)].mean
    return max(target.settings.tolerance or found, found)


def precision_of(target: ProofTarget, reference: Reference) -> str:
    """The coarsest of what the engine computes with, what was trained on, and what the training side computed with."""
    served = served_precision(target.folder, target.dtype)
    trained = TRAINED.get(str(reference.trained_on), "fp32")
    stored = reference.precision if reference.precision in ORDER else "fp32"
    return max(served, trained, stored, key=ORDER.index)


def served_precision(folder: Path, dtype: str = "auto") -> str:
    """Precision of the weights of a model folder as an engine computes with them."""
    config = json.loads((folder / "config.json").read_text())
    config = {**config, **config.get("text_config", {})}
    if packed := config.get("quantization_config"):
        return _packed(packed)
    if dtype != "auto":
        return dtype
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    precision = _DTYPES.get(named.removeprefix("torch."), "bf16")
    return (
        "bf16" if precision == "fp32" else precision
    )  # engines do not keep fp32 unless they are told to


def _packed(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method", ""))
    if "fp8" in method:
        return "fp8"
    if method == "bitsandbytes":
        return "int4" if settings.get("load_in_4bit") else "int8"
    groups = settings.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    if any(w.get("type") == "float" and w.get("num_bits") == 8 for w in weights):
        return "fp8"
    bits = [w.get("num_bits") for w in weights] or [settings.get("bits") or settings.get("w_bit")]
    return max((_BITS.get(int(b or 4), "int4") for b in bits), key=ORDER.index)
