"""The GPU that a model will be served on: given by the profile, or asked of ``nvidia-smi``."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace

_TIMEOUT_S = 3.0
_QUERY = "name,compute_cap,memory.total,memory.used"


@dataclass(frozen=True)
class GpuFacts:
    """One GPU of the machine; all its GPUs are taken to be alike.

    Attributes:
        name: As the driver names it.
        capability: Compute capability: 8.0 Ampere, 8.9 Ada, 9.0 Hopper, 10.0 and 12.0 Blackwell.
        memory_bytes: All of it.
        used_bytes: What other processes hold now.
        count: GPUs of the machine.
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
    """The machine's first GPU by ``nvidia-smi``; ``None`` where there is none, or it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse(done.stdout) if done.returncode == 0 else None


def parse(text: str) -> GpuFacts | None:
    """Lines of ``name, capability, MiB in all, MiB used``; the GPU with most memory in use speaks for all."""
    try:
        found = [_row(line) for line in text.strip().splitlines()]
    except ValueError:  # a driver that writes [N/A]
        return None
    if not found:
        return None
    fullest = max(found, key=lambda gpu: gpu.used_bytes)
    return replace(fullest, count=len(found))


def _row(line: str) -> GpuFacts:
    name, capability, total, used = (part.strip() for part in line.rsplit(",", 3))
    return GpuFacts(name, float(capability), int(total) * 2**20, int(used) * 2**20)
