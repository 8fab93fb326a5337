"""The GPU that a model will be served on: given by the profile, or asked of ``nvidia-smi``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

_TIMEOUT_S = 3.0
_QUERY = "index,uuid,name,mig.mode.current,compute_cap,memory.total,memory.used"
_MOST_PARTS = 7
"""MIG devices that one GPU can be cut into: how many there are, and how large, is read when an engine starts."""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU of the machine; all its GPUs are taken to be alike.

    Attributes:
        name: As the driver names it.
        capability: Compute capability: 8.0 Ampere, 8.9 Ada, 9.0 Hopper, 10.0 and 12.0 Blackwell.
        memory_bytes: All of it; ``None`` for one that is cut into MIG devices.
        used_bytes: What other processes hold now.
        count: GPUs that programs see.
    """

    name: str = "GPU"
    capability: float | None = None
    memory_bytes: int | None = None
    used_bytes: int = 0
    count: int = 1


def described(memory_gib: float | None, capability: float | None, count: int) -> GpuFacts:
    """A GPU that a profile describes; nothing is known of what is in use there."""
    size = None if memory_gib is None else int(memory_gib * 2**30)
    return GpuFacts("GPU of the profile", capability, size, count=count)


def ask_driver() -> GpuFacts | None:
    """The GPUs that programs see, by ``nvidia-smi``; ``None`` where there is none, or it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse(done.stdout) if done.returncode == 0 else None


def parse(text: str, environ: Mapping[str, str] | None = None) -> GpuFacts | None:
    """Lines as :data:`_QUERY` asks for; the GPU with most memory in use speaks for all.

    Args:
        text: What the driver said of every GPU of the machine.
        environ: Where ``CUDA_VISIBLE_DEVICES`` may hide some of them; this process's unless given.
    """
    given = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    try:
        rows = [_row(line) for line in text.strip().splitlines()]
    except ValueError:  # a driver that writes [N/A]
        return None
    seen = [replace(gpu, count=_seen(given, index, uuid, gpu)) for index, uuid, gpu in rows]
    found = [gpu for gpu in seen if gpu.count]
    if not found:
        return None
    fullest = max(found, key=lambda gpu: gpu.used_bytes)
    return replace(fullest, count=sum(gpu.count for gpu in found))


def _seen(given: str | None, index: str, uuid: str, gpu: GpuFacts) -> int:
    """How often ``CUDA_VISIBLE_DEVICES`` names this GPU or parts of it; the start of a uuid is enough."""
    if given is None:
        return gpu.count
    names = [name.strip() for name in given.split(",")]
    parts = sum(name.startswith("MIG-") for name in names) if gpu.count > 1 else 0
    if parts:  # of which GPU they are is not said here
        return parts
    return int(index in names or any(len(name) > 4 and uuid.startswith(name) for name in names))


def _row(line: str) -> tuple[str, str, GpuFacts]:
    index, uuid, rest = (part.strip() for part in line.split(",", 2))
    name, mode, capability, total, used = (part.strip() for part in rest.rsplit(",", 4))
    if mode == "Enabled":
        return index, uuid, GpuFacts(name, float(capability), count=_MOST_PARTS)
    return index, uuid, GpuFacts(name, float(capability), int(total) * 2**20, int(used) * 2**20)
