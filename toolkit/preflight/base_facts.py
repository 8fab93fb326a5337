"""What is known of a base model: its ``config.json``, and the headers of its weights where they are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.engines import BLOCK
from toolkit.forecast.shape import ModelShape
from toolkit.preflight.headers import Weights, read_weights

FLOATS = ("F64", "F32", "F16", "BF16")

TOWERS = ("vision", "visual", "audio", "image", "multi_modal_projector", "connector", "aligner")
"""Words in the names of modules that do not belong to the language model."""


@dataclass(frozen=True)
class BaseFacts:
    """What ``config.json`` of the base says; ``None`` where it does not say."""

    config: Mapping[str, Any]
    weights: tuple[Weights, ...] = ()
    """Headers of its safetensors files; empty when the base is not here yet."""
    missing: tuple[str, ...] = ()
    """Files that its index names and that are not there."""

    @property
    def _text(self) -> Mapping[str, Any]:
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def number(self, key: str) -> int | None:
        """An integer of the language model's part of the config."""
        value = self._text.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def architecture(self) -> str | None:
        """First of ``architectures``."""
        named = self.config.get("architectures") or ()
        return str(named[0]) if named else None

    @property
    def family(self) -> str:
        """``model_type`` of the language model; empty where it does not say."""
        return str(self._text.get("model_type") or "")

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self._text.get("tie_word_embeddings", self.config.get("tie_word_embeddings")))

    @property
    def is_moe(self) -> bool:
        """Whether it has routed experts."""
        keys = ("num_experts", "num_local_experts", "n_routed_experts")
        return any(self.number(key) for key in keys)

    @property
    def is_multimodal(self) -> bool:
        """Whether it reads more than text."""
        return any(f"{kind}_config" in self.config for kind in ("vision", "audio", "image"))

    @property
    def head_dim(self) -> int | None:
        """Width of one attention head."""
        hidden, heads = self.number("hidden_size"), self.number("num_attention_heads")
        return self.number("head_dim") or (hidden // heads if hidden and heads else None)

    @property
    def kv_heads(self) -> int | None:
        """Heads of keys and values: fewer than of queries with grouped-query attention."""
        return self.number("num_key_value_heads") or self.number("num_attention_heads")

    @property
    def rope(self) -> Mapping[str, Any]:
        """``rope_scaling`` (Transformers 4) or ``rope_parameters`` (5)."""
        value = self._text.get("rope_scaling") or self._text.get("rope_parameters")
        return value if isinstance(value, dict) else {}

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """``quantization_config`` of a base that is quantized already."""
        value = self.config.get("quantization_config") or self._text.get("quantization_config")
        return value if isinstance(value, dict) else None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one weight at full precision."""
        named = str(self._text.get("dtype") or self._text.get("torch_dtype") or "bfloat16")
        return 4 if named.endswith("float32") else 2

    @cached_property
    def weight_bytes(self) -> int | None:
        """Bytes of its weights: of the files where they are here, or counted from the config."""
        if self.weights:
            return sum(one.bytes for one in self.weights)
        parameters = self.parameters
        return None if parameters is None else parameters * self.dtype_bytes

    @cached_property
    def parameters(self) -> int | None:
        """Weights of a dense decoder by its config; ``None`` where the config says too little."""
        layers, hidden = self.number("num_hidden_layers"), self.number("hidden_size")
        vocabulary = self.number("vocab_size")
        if self.is_moe or not (layers and hidden and vocabulary):
            return None
        linear = [self.linear(name) for name in BLOCK]
        if any(pair is None for pair in linear):
            return None
        per_layer = sum(out * width for out, width in filter(None, linear)) + 2 * hidden
        embeddings = vocabulary * hidden * (1 if self.is_tied else 2)
        return layers * per_layer + embeddings + hidden

    def linear(self, name: str) -> tuple[int, int] | None:
        """(outputs, inputs) of a linear layer by the config; ``None`` where it is not that simple.

        Source of the sizes: transformers, models/llama/modeling_llama.py, which most decoders
        follow; multi-head latent attention (``kv_lora_rank``) does not.
        """
        hidden, inner, head = (
            self.number("hidden_size"),
            self.number("intermediate_size"),
            self.head_dim,
        )
        heads, kv_heads = self.number("num_attention_heads"), self.kv_heads
        vocabulary = self.number("vocab_size")
        if hidden is None:
            return None
        if name in ("lm_head", "embed_tokens"):
            return (vocabulary, hidden) if vocabulary else None
        if name in ("gate_proj", "up_proj", "down_proj") and inner and not self.is_moe:
            return (hidden, inner) if name == "down_proj" else (inner, hidden)
        if self.number("kv_lora_rank") or not (head and heads and kv_heads):
            return None
        return {
            "q_proj": (heads * head, hidden),
            "k_proj": (kv_heads * head, hidden),
            "v_proj": (kv_heads * head, hidden),
            "o_proj": (hidden, heads * head),
        }.get(name)

    @cached_property
    def modules(self) -> Mapping[str, tuple[int, ...] | None]:
        """Module name -> shape of its weight, ``None`` for a packed one; empty when not here."""
        found: dict[str, tuple[int, ...] | None] = {}
        for one in self.weights:
            for name, tensor in one.tensors.items():
                module, _, part = name.rpartition(".")
                plain = part == "weight" and tensor.dtype in FLOATS
                shape = tensor.shape if plain and len(tensor.shape) > 1 else None
                found[module] = shape or found.get(module)
        if found and self.is_tied:
            found.setdefault("lm_head", found.get("model.embed_tokens"))
        return found


def read_base(folder: Path, config: Mapping[str, Any], index: Mapping[str, Any]) -> BaseFacts:
    """Headers of all ``*.safetensors`` in ``folder``, and files that ``index`` names in vain."""
    named = sorted(set((index.get("weight_map") or {}).values()))
    return BaseFacts(
        config,
        tuple(read_weights(file) for file in sorted(folder.glob("*.safetensors"))),
        tuple(name for name in named if not (folder / name).is_file()),
    )


FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_norms": True},
    "gemma2": {"norms": 4, "capped": True},
    "gemma3_text": {"norms": 4, "head_norms": True},
}
"""``model_type`` of the decoders whose memory was compared with the forecast, and how they differ from Llama."""


def shape_of(base: BaseFacts) -> ModelShape | None:
    """Sizes for the forecasts; ``None`` where the config is not that of a dense decoder."""
    layers, hidden = base.number("num_hidden_layers"), base.number("hidden_size")
    inner, vocabulary = base.number("intermediate_size"), base.number("vocab_size")
    if base.number("kv_lora_rank") or base.is_moe or not (base.kv_heads and base.head_dim):
        return None
    if not (layers and hidden and inner and vocabulary):
        return None
    return ModelShape(
        layers,
        hidden,
        inner,
        base.kv_heads,
        base.head_dim,
        vocabulary,
        {name: pair for name in BLOCK if (pair := base.linear(name))},
        heads=base.number("num_attention_heads") or 0,
        tied=base.is_tied,
        known=base.family in FAMILIES,
        **FAMILIES.get(base.family, {}),
    )
