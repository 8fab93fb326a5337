"""The GPU that a model will be served on: given by the profile, or asked of ``nvidia-smi``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

_TIMEOUT_S = 3.0
_QUERY = "index,uuid,name,compute_cap,memory.total,memory.used"


@dataclass(frozen=True)
class GpuFacts:
    """One GPU of the machine; all its GPUs are taken to be alike.

    Attributes:
        name: As the driver names it.
        capability: Compute capability: 8.0 Ampere, 8.9 Ada, 9.0 Hopper, 10.0 and 12.0 Blackwell.
        memory_bytes: All of it.
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
    """Lines of ``index, uuid, name, capability, MiB in all, MiB used``; the GPU with most memory in use speaks for all.

    Args:
        text: What the driver said of every GPU of the machine.
        environ: Where ``CUDA_VISIBLE_DEVICES`` may hide some of them; this process's unless given.
    """
    given = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    try:
        rows = [_row(line) for line in text.strip().splitlines()]
    except ValueError:  # a driver that writes [N/A]
        return None
    found = [gpu for index, uuid, gpu in rows if given is None or _named(given, index, uuid)]
    if not found:
        return None
    fullest = max(found, key=lambda gpu: gpu.used_bytes)
    return replace(fullest, count=len(found))


def _named(given: str, index: str, uuid: str) -> bool:
    """Whether ``CUDA_VISIBLE_DEVICES`` names this GPU; the start of a uuid is enough."""
    names = [name.strip() for name in given.split(",")]
    return index in names or any(len(name) > 4 and uuid.startswith(name) for name in names)


def _row(line: str) -> tuple[str, str, GpuFacts]:
    index, uuid, rest = (part.strip() for part in line.split(",", 2))
    name, capability, total, used = (part.strip() for part in rest.rsplit(",", 3))
    return index, uuid, GpuFacts(name, float(capability), int(total) * 2**20, int(used) * 2**20)
