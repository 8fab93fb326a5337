"""What is wrong with an adapter's files, read without torch: the likely cause when it acts otherwise than trained."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""How PEFT begins every name; an engine that finds none of its own names loads nothing and answers as the base."""
_LAYER = re.compile(r"\.layers?\.(\d+)\.|\.h\.(\d+)\.|\.blocks\.(\d+)\.")


def likely_cause(folder: Path, base: Path) -> str | None:
    """What explains an adapter that does not act as it was trained; None when its files look right.

    Args:
        folder: The adapter.
        base: The model folder it is served on.
    """
    return unloadable(folder, base) or next(filter(None, _silent(folder, base)), None)


def unloadable(folder: Path, base: Path) -> str | None:
    """What makes an adapter dangerous to load: SGLang 0.5.17 dies of a wrong shape, vLLM 0.26 serves garbage.

    Preflight asks the same before an adapter is sent to an engine; this reads headers alone, in milliseconds.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        return f"there is no {WEIGHTS}"
    try:
        header, start = _header(path)
    except ValueError as error:
        return f"{WEIGHTS} is cut off or not safetensors: {error}"
    if not any("lora_" in name for name in header):
        return f"{WEIGHTS} has no LoRA matrices (lora_A, lora_B)"
    return _cut_off(path, header, start) or _foreign_shape(header, base)


def _silent(folder: Path, base: Path) -> Iterator[str | None]:
    """What an engine loads without a word."""
    path = folder / WEIGHTS
    header, start = _header(path)
    yield _all_zero(path, header, start)
    yield _mis_prefixed(header)
    yield _layers_missing(header, folder, base)
    yield _unknown_names(header, base)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError(f"its header would be {length} bytes long")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _cut_off(path: Path, header: Mapping[str, Any], start: int) -> str | None:
    end = max((t["data_offsets"][1] for t in header.values()), default=0)
    size = path.stat().st_size - start
    return (
        f"{WEIGHTS} is cut off: {size} bytes of weights, and its header says {end}"
        if size < end
        else None
    )


def _all_zero(path: Path, header: Mapping[str, Any], start: int) -> str | None:
    products = {n: t for n, t in header.items() if "lora_B" in n or "lora_embedding_B" in n}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for tensor in products.values():
            first, last = tensor["data_offsets"]
            if data[start + first : start + last].count(0) != last - first:
                return None
    return f"all {len(products)} matrices lora_B are zero: this adapter does nothing"


def _mis_prefixed(header: Mapping[str, Any]) -> str | None:
    wrong = [name for name in header if not name.startswith(PREFIX)]
    if wrong:
        return (
            f"{len(wrong)} of {len(header)} names do not begin with {PREFIX!r} (such as {wrong[0]!r}): "
            "the engine finds none of its layers under them"
        )
    return None


def _foreign_shape(header: Mapping[str, Any], base: Path) -> str | None:
    shapes = _base_tensors(base)
    for name, tensor in header.items():
        known = shapes.get(f"{_target(name)}.weight")
        if known is None or len(known) != 2:
            continue
        for kind, mine, theirs in (
            ("lora_A.", tensor["shape"][-1], 1),
            ("lora_B.", tensor["shape"][0], 0),
        ):
            if kind in name and mine != known[theirs]:
                return f"it was made for a base of another shape: {name} has {mine}, and the base {known[theirs]}"
    return _foreign_width(header, base)


def _foreign_width(header: Mapping[str, Any], base: Path) -> str | None:
    """The same by the hidden size alone, for a base whose weights are packed."""
    hidden = _text_config(base).get("hidden_size")
    for name, tensor in header.items():
        width = tensor["shape"][-1]
        if hidden and re.search(r"\.(q|k|v|gate|up)_proj\.lora_A", name) and width != hidden:
            return f"it was made for a base of another shape: {name} has {width}, and the base {hidden}"
    return None


def _layers_missing(header: Mapping[str, Any], folder: Path, base: Path) -> str | None:
    config = json.loads((folder / "adapter_config.json").read_text())
    layers = _text_config(base).get("num_hidden_layers")
    found = {int(next(filter(None, m.groups()), 0)) for n in header if (m := _LAYER.search(n))}
    if (
        not layers
        or not found
        or config.get("layers_to_transform")
        or config.get("layer_replication")
    ):
        return None
    if max(found) >= layers:
        return f"it has weights for layer {max(found)}, and the base has {layers} layers"
    if len(found) < layers:
        missing = sorted(set(range(layers)) - found)
        return f"it has weights for {len(found)} of {layers} layers; layer {missing[0]} is the first that is missing"
    return None


def _unknown_names(header: Mapping[str, Any], base: Path) -> str | None:
    """Names whose layer the base does not have, by the base's own tensors."""
    known = {name.removesuffix(".weight") for name in _base_tensors(base)}
    named = {_target(name) for name in header}
    lost = sorted(name for name in named if name not in known)
    if known and lost:
        return (
            f"{len(lost)} of {len(named)} layers it names are not in the base (such as {lost[0]!r}): "
            "the engine leaves them out"
        )
    return None


def _target(name: str) -> str:
    return re.split(r"\.(?:lora_|base_layer)", name.removeprefix(PREFIX))[0]


def _base_tensors(base: Path) -> dict[str, list[int]]:
    """Shapes of the base's tensors by name; none when it is packed (quantized) under other names."""
    shapes: dict[str, list[int]] = {}
    for shard in sorted(base.glob("*.safetensors")):
        try:
            shapes |= {name: tensor["shape"] for name, tensor in _header(shard)[0].items()}
        except (OSError, ValueError):
            return {}
    packed = any(n.endswith((".qweight", ".weight_packed", ".weight_scale")) for n in shapes)
    return {} if packed else shapes


def _text_config(base: Path) -> dict[str, Any]:
    config = json.loads((base / "config.json").read_text())
    return {**config, **config.get("text_config", {})}
