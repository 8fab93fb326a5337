"""Named tensors in safetensors files of a bounded size, written one after the other."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

SHARD_BYTES = 4 * 2**30
"""What is held in memory before it is written."""


class ShardWriter:
    """Writes ``PREFIX-000.safetensors``, ``PREFIX-001.safetensors``, ... into a folder."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self._held: dict[str, Any] = {}
        self._bytes = 0
        self._written = 0

    def add(self, name: str, tensor: Any) -> None:
        """Take a copy on the CPU; the caller may change or free its own."""
        import torch

        self._held[name] = tensor.detach().to(
            "cpu", copy=True, memory_format=torch.contiguous_format
        )
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is held."""
        from safetensors.torch import save_file

        if self._held:
            name = f"{self.prefix}-{self._written:03d}.safetensors"
            save_file(self._held, self.folder / name)
            self._held, self._bytes = {}, 0
            self._written += 1


class Shards:
    """The tensors of all ``PREFIX-*.safetensors`` of a folder, read when they are asked for."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.paths = sorted(folder.glob(f"{prefix}-*.safetensors"))

    @cached_property
    def _files(self) -> dict[str, Any]:
        from safetensors import safe_open

        files = [safe_open(path, "pt") for path in self.paths]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

    @property
    def names(self) -> tuple[str, ...]:
        """All there are."""
        return tuple(self._files)

    def __getitem__(self, name: str) -> Any:
        """A tensor on the CPU."""
        return self._files[name].get_tensor(name)
