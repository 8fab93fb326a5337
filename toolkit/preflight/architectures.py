"""Which model architectures an engine has, and where it puts LoRA: read from its source.

``architectures.json`` is written by ``engine_source.py``; one entry for each engine and version.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from toolkit.preflight.versions import Version, parse_version

_FILE = Path(__file__).with_name("architectures.json")


@dataclass(frozen=True)
class Known:
    """What one version of an engine knows.

    Attributes:
        source: Engine and version, as people name them: ``vllm 0.32.0``.
        architectures: Those with code of their own in the engine.
        lora: Those that take adapters.
        embeddings: Those that take them on ``embed_tokens`` and ``lm_head`` too.
        tower: Those that take them on the vision tower, when asked to.
    """

    source: str
    architectures: Collection[str]
    lora: Collection[str]
    embeddings: Collection[str]
    tower: Collection[str]
    methods: Collection[str]
    """Values of ``quant_method`` that it knows."""


def known(engine: str, version: Version) -> Known | None:
    """The entry of the newest version that is not newer than ``version``; the oldest for older ones."""
    found = {v: name for name in _entries() for e, v in [_split(name)] if e == engine}
    if not found or not version:
        return None
    older = [v for v in found if v <= version]
    name = found[max(older) if older else min(found)]
    entry = _entries()[name]
    every = frozenset(entry["architectures"])
    lora = frozenset(entry.get("lora", every))
    return Known(
        name,
        every,
        lora,
        frozenset(entry.get("embeddings", lora)),
        frozenset(entry.get("tower", ())),
        frozenset(entry["methods"]),
    )


def _split(name: str) -> tuple[str, Version]:
    engine, _, version = name.partition(" ")
    return engine, parse_version(version)


@cache
def _entries() -> dict[str, dict[str, list[str]]]:
    entries: dict[str, dict[str, list[str]]] = json.loads(_FILE.read_text())
    return entries
