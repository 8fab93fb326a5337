"""Folders that leave training: the name of their base, weights stored as another type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def base_id(folder: Path, facts: Mapping[str, Any]) -> str:
    """Name of a base that means the same on another machine: the recipe's source, never a path.

    Args:
        folder: The base's folder, whose ``config.json`` may name where it came from.
        facts: Facts of the base's artifact; ``source`` is used when there.
    """
    named = json.loads((folder / "config.json").read_text()).get("_name_or_path", "")
    for candidate in (facts.get("source"), named):
        if isinstance(candidate, str) and candidate and not _is_path(candidate):
            return candidate
    return "base"


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text


def store_as(source: Path, target: Path, dtype: str) -> None:
    """Store weights as another type, one shard at a time; equal types are linked, not copied.

    Args:
        source: Folder with ``config.json`` and safetensors.
        target: Existing folder.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from toolkit.models.folder import link_or_copy
    from toolkit.train.model import torch_dtype

    wanted = torch_dtype(dtype)
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if all(t.dtype == wanted for t in tensors.values() if t.is_floating_point()):
            link_or_copy(shard, target / shard.name)
        else:
            cast = {n: t.to(wanted) if t.is_floating_point() else t for n, t in tensors.items()}
            save_file(cast, target / shard.name, metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    if index.is_file():
        stored = json.loads(index.read_text())
        stored["metadata"]["total_size"] = sum(
            p.stat().st_size for p in target.glob("*.safetensors")
        )
        (target / index.name).write_text(json.dumps(stored, indent=2))
    settings = json.loads((source / "config.json").read_text())
    settings["dtype"] = str(wanted).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
