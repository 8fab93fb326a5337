"""What is known of a finished adapter: its ``adapter_config.json`` and the header of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.preflight.headers import Weights, all_zero, read_weights
from toolkit.preflight.reading import read_json

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""

_PAIR = re.compile(r"(?P<module>.+)\.(?P<side>lora_A|lora_B)\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.(?P<side>lora_embedding_A|lora_embedding_B)")
_BASE_COPY = (".base_layer.weight", ".base_layer.bias")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

_ZERO_LIMIT = 64 * 2**20
"""Bytes that are read to find out that an adapter is all zeros."""


@dataclass(frozen=True)
class Pair:
    """The two tensors of one module, as PEFT stores them.

    Attributes:
        a: ``lora_A`` is [rank, inputs]; of an embedding [rank, vocabulary].
        b: ``lora_B`` is [outputs, rank]; of an embedding [hidden, rank].
        is_embedding: Stored as ``lora_embedding_A`` and ``lora_embedding_B``.
    """

    a: tuple[int, ...] | None = None
    b: tuple[int, ...] | None = None
    is_embedding: bool = False

    @property
    def rank(self) -> int | None:
        """By the shape of ``lora_A``."""
        return self.a[0] if self.a else None


@dataclass(frozen=True)
class AdapterFacts:
    """What the folder of a finished adapter says."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why the folder cannot be read, if it cannot."""
    weights: Weights | None = None
    added_tokens: Mapping[str, Any] = field(default_factory=dict)
    """Token -> id, from added_tokens.json; tokenizers copy those of the base into it."""
    base_hash: str | None = None
    """Of the base it was trained on, from reference.json."""
    is_zero: bool = False
    """Whether every ``lora_B`` is zero: a folder that was never trained, or lost its weights."""

    @property
    def rank(self) -> int:
        """The largest rank in the adapter, ``rank_pattern`` included; 0 when it does not say."""
        patterns = self.config.get("rank_pattern") or {}
        return max(int(self.config.get("r") or 0), *map(int, patterns.values()), 0)

    def rank_of(self, module: str) -> int:
        """The rank that the config gives to a module: PEFT's ``get_pattern_key`` takes the first match."""
        for pattern, rank in (self.config.get("rank_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return int(rank)
        return int(self.config.get("r") or 0)

    @cached_property
    def pairs(self) -> Mapping[str, Pair]:
        """Module name (without PEFT's prefix) -> its two tensors."""
        found: dict[str, dict[str, Any]] = {}
        for name, shape in (self.weights.shapes if self.weights else {}).items():
            match = _PAIR.fullmatch(name) or _EMBEDDING.fullmatch(name)
            if match:
                module = match["module"].removeprefix(PREFIX)
                entry = found.setdefault(module, {"is_embedding": "embedding" in match["side"]})
                entry["a" if match["side"].endswith("A") else "b"] = shape
        return {module: Pair(**entry) for module, entry in found.items()}

    @cached_property
    def strangers(self) -> tuple[str, ...]:
        """Tensors that are no pair and no copy of a base weight: what a plain LoRA does not have."""
        names = self.weights.tensors if self.weights else ()
        return tuple(
            name
            for name in names
            if not (
                _PAIR.fullmatch(name) or _EMBEDDING.fullmatch(name) or name.endswith(_BASE_COPY)
            )
        )

    @property
    def targets(self) -> set[str]:
        """Last part of each module's name: ``{"q_proj", "v_proj"}``."""
        return {module.rpartition(".")[2] for module in self.pairs}

    @property
    def layers(self) -> set[int]:
        """Numbers of the layers that have a pair."""
        return {int(match[1]) for module in self.pairs if (match := _LAYER.search(module))}


def read_adapter(folder: Path) -> AdapterFacts:
    """Read ``adapter_config.json`` and the header of ``adapter_model.safetensors``."""
    config = read_json(folder / "adapter_config.json")
    if config is None:
        return AdapterFacts(folder, problem="has no readable adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return AdapterFacts(folder, config, _without_weights(folder))
    weights = read_weights(file)
    if weights.problem:
        return AdapterFacts(folder, config, f"{file.name} {weights.problem}")
    seconds = [n for n in weights.tensors if ".lora_B." in n or n.endswith("lora_embedding_B")]
    reference = read_json(folder / "reference.json") or {}
    return AdapterFacts(
        folder,
        config,
        weights=weights,
        added_tokens=read_json(folder / "added_tokens.json") or {},
        base_hash=_text(reference.get("digests"), "base"),
        is_zero=bool(seconds) and all_zero(weights, seconds, _ZERO_LIMIT) is True,
    )


def _without_weights(folder: Path) -> str:
    pickled = [n for n in ("adapter_model.bin", "adapter_model.pt") if (folder / n).is_file()]
    also = f", only {pickled[0]}, which can run code when it is loaded" if pickled else ""
    return f"has no adapter_model.safetensors{also}"


def _text(value: Any, key: str) -> str | None:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, str) else None
