"""Headers of safetensors files: what tensors a file says it has, and whether its bytes are all there.

The format (huggingface/safetensors, README: Format): 8 bytes little-endian length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, then the tensors without gaps. Reading
the header takes milliseconds, whatever the size of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

_LENGTH_BYTES = 8
_ZEROS = bytes(2**20)
_HEADER_LIMIT = 100 * 2**20
"""Bytes; the format allows no longer header."""

BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of each dtype of the format."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a header; ``begin`` and ``end`` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


@dataclass(frozen=True)
class Weights:
    """A safetensors file by its header."""

    path: Path
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    data_start: int = 0
    problem: str | None = None
    """Why the file cannot be loaded, if it cannot: ``is truncated: ...``."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by tensor name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def read_weights(path: Path) -> Weights:
    """Read a header and compare what it promises with the size of the file. Reads no tensor."""
    size = path.stat().st_size
    if size == 0:
        return Weights(path, problem="is empty (0 bytes)")
    header = _header(path)
    if header is None:
        return Weights(path, problem="is damaged: its header cannot be read")
    start, entries = header
    try:
        tensors = {name: _tensor(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError):
        return Weights(path, problem="is damaged: its header is not that of a safetensors file")
    return Weights(path, tensors, start, _problem(tensors, start, size))


def all_zero(weights: Weights, names: Iterable[str], limit_bytes: int) -> bool | None:
    """Whether every named tensor is zero in all its bytes; ``None`` beyond ``limit_bytes``.

    A trained tensor ends the search with its first piece, so only zeros are read to the end.
    """
    left = limit_bytes
    with weights.path.open("rb") as file:
        for name in names:
            tensor = weights.tensors[name]
            file.seek(weights.data_start + tensor.begin)
            remaining = tensor.bytes
            while remaining:
                piece = file.read(min(remaining, len(_ZEROS)))
                if piece != _ZEROS[: len(piece)]:
                    return False
                remaining, left = remaining - len(piece), left - len(piece)
                if left <= 0 or not piece:
                    return None
    return True


def _header(path: Path) -> tuple[int, dict[str, Any]] | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        raw = file.read(length) if 0 < length <= _HEADER_LIMIT else b""
    try:
        header = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(header, dict):
        return None
    header.pop("__metadata__", None)
    return _LENGTH_BYTES + length, header


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    return Tensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), int(begin), int(end))


def _problem(tensors: Mapping[str, Tensor], start: int, size: int) -> str | None:
    for name, tensor in tensors.items():
        bits = BITS.get(tensor.dtype)
        if bits is not None and tensor.bytes * 8 != prod(tensor.shape) * bits:
            return (
                f"is damaged: {name} has {tensor.bytes} bytes for {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    order = sorted(tensors.values(), key=lambda t: t.begin)
    if any(a.end != b.begin for a, b in pairwise(order)):
        return "is damaged: its tensors do not follow each other"
    promised = start + (order[-1].end if order else 0)
    if size < promised:
        return f"is truncated: its header promises {promised} bytes, the file has {size}"
    if size > promised:
        return f"is damaged: its header promises {promised} bytes, the file has {size}"
    return None
