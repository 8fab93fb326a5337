"""Adapters that are broken in the ways in which they break, made from a good one; for the proofs against real engines.

Standard library alone: the GPU host's engines and this machine's tests make them the same way.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, tuple[dict, bytes]]
"""Name -> (dtype and shape, bytes)."""


def read(path: Path) -> Tensors:
    """All tensors of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    header.pop("__metadata__", None)
    return {
        name: (
            {"dtype": t["dtype"], "shape": t["shape"]},
            raw[end + t["data_offsets"][0] : end + t["data_offsets"][1]],
        )
        for name, t in header.items()
    }


def write(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file."""
    header, data = {"__metadata__": {"format": "pt"}}, []
    end = 0
    for name, (facts, raw) in tensors.items():
        header[name] = facts | {"data_offsets": [end, end + len(raw)]}
        end += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def changed(
    good: Path, folder: Path, tensors: Callable[[Tensors], Tensors] | None = None, **config
) -> Path:
    """A copy of an adapter with other tensors or another configuration, and no reference of its own."""
    shutil.copytree(good, folder)
    (folder / "reference.json").unlink(missing_ok=True)
    if tensors:
        write(folder / WEIGHTS, tensors(read(good / WEIGHTS)))
    settings = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def zero(tensors: Tensors) -> Tensors:
    """All matrices B are zero: it does nothing."""
    return {n: (f, bytes(len(raw)) if "lora_B" in n else raw) for n, (f, raw) in tensors.items()}


def mis_prefixed(tensors: Tensors) -> Tensors:
    """Names of another wrapper: vLLM finds none of its layers."""
    return {
        n.replace("base_model.model.model", "base_model.model.transformer"): t
        for n, t in tensors.items()
    }


def every_other_layer(tensors: Tensors) -> Tensors:
    """Half of the layers are missing."""
    return {n: t for n, t in tensors.items() if int(n.split(".layers.")[1].split(".")[0]) % 2 == 0}


def truncated(good: Path, folder: Path) -> Path:
    """The file ends in the middle."""
    changed(good, folder)
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) * 2 // 3])
    return folder
