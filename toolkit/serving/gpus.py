"""Which GPUs an engine gets, and whether there is room on them."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import EngineError
from toolkit.recipe.serve import ServeSection

QUERY = (
    *("nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free,mig.mode.current"),
    "--format=csv,noheader,nounits",
)
MARGIN_MIB = 512
"""What other programs may still take between this look and the engine's own."""
OVERHEAD = 1.15
"""Memory of loaded weights relative to their files: buffers, CUDA context, graphs."""
SMALLEST_CACHE_MIB = 1024
"""KV cache below which an engine would not be worth its start."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as ``nvidia-smi`` sees it, or one MIG device of it; memory in MiB.

    Attributes:
        index: Its number; ``0 (MIG 1)`` for a part of one.
        uuid: ``GPU-...`` or ``MIG-...``: what an engine is told.
        total_mib: All of its memory.
        free_mib: What nobody holds now.
        names: What else ``CUDA_VISIBLE_DEVICES`` may call it.
        cut: It is in MIG mode: its devices are used, not the GPU.
    """

    index: str
    uuid: str
    total_mib: int
    free_mib: int
    names: tuple[str, ...] = ()
    cut: bool = False

    @property
    def is_part(self) -> bool:
        """Whether it is a MIG device."""
        return self.uuid.startswith("MIG-")


def gpus_per_replica(serve: ServeSection) -> int:
    """GPUs that one engine takes: tensor times pipeline times data parallel."""
    values = serve.model_dump()
    kinds = ("tensor_parallel", "pipeline_parallel", "data_parallel")
    return math.prod(int(values.get(kind) or 1) for kind in kinds)


def query() -> list[Gpu]:
    """All GPUs of this machine; in the place of one in MIG mode, the devices that it is cut into.

    Raises:
        EngineError: ``nvidia-smi`` is missing or fails.
    """
    found = read(_ask(*QUERY))
    if not any(gpu.cut for gpu in found):
        return found
    from toolkit.serving import mig

    parts = mig.devices(_ask(*mig.NAMES), _ask(*mig.MEMORY))
    return [part for gpu in found for part in (parts.get(gpu.uuid, []) if gpu.cut else [gpu])]


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(
            f"the GPUs cannot be counted: nvidia-smi: {error}",
            "is the NVIDIA driver there? A profile with `device: cpu` serves on the CPU",
        ) from None
    return done.stdout


def read(text: str) -> list[Gpu]:
    """Read the answer to :data:`QUERY`.

    Raises:
        EngineError: It is no number: `[N/A]`, `[Unknown Error]`.
    """
    try:
        return [_row(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        raise EngineError(
            f"nvidia-smi does not say how much memory the GPUs have: {text.strip()!r}",
            "a GPU that shares the host's memory, or one in an error state; see `nvidia-smi`",
        ) from None


def _row(line: str) -> Gpu:
    index, uuid, total, free, mode = (part.strip() for part in line.split(","))
    if mode == "Enabled":  # in a container the memory of the whole is not ours to see
        return Gpu(index, uuid, 0, 0, cut=True)
    return Gpu(index, uuid, int(total), int(free))


def visible(gpus: Sequence[Gpu], environ: Mapping[str, str] | None = None) -> list[Gpu]:
    """Those that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; like CUDA it ends at the first unknown one.

    Names are numbers, ``GPU-...`` and ``MIG-...``, which may be shortened, and ``MIG-GPU-.../1/0`` of older drivers.
    """
    given = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return list(gpus)
    found: list[Gpu] = []
    for name in (part.strip() for part in given.split(",")):
        gpu = next((gpu for gpu in gpus if _is_called(gpu, name)), None)
        if gpu is None:
            break
        found.append(gpu)
    return found


def _is_called(gpu: Gpu, name: str) -> bool:
    if name.startswith(("GPU-", "MIG-")):
        return any(known.startswith(name) for known in (gpu.uuid, *gpu.names))
    return bool(name) and name in (gpu.index, *gpu.names)


def slices(gpus: Sequence[Gpu], replicas: int, each: int) -> list[tuple[Gpu, ...]]:
    """GPUs of every replica; no GPU belongs to two.

    Raises:
        EngineError: There are too few, or an engine would need several MIG devices.
    """
    needed = replicas * each
    part = next((gpu for gpu in gpus[:needed] if gpu.is_part), None)
    if each > 1 and part:
        raise EngineError(
            f"an engine on {each} GPUs cannot have GPU {part.index} among them: CUDA gives a process one "
            "MIG device",
            "set serve.tensor_parallel, serve.pipeline_parallel and serve.data_parallel to 1, or choose "
            "whole GPUs with CUDA_VISIBLE_DEVICES",
        )
    if len(gpus) < needed:
        raise EngineError(
            f"{replicas} replicas of {each} GPU{'s' * (each > 1)} each need {needed} GPUs, "
            f"but {len(gpus)} {'is' if len(gpus) == 1 else 'are'} visible",
            f"set serve.replicas to {len(gpus) // each or 1}, or look at CUDA_VISIBLE_DEVICES",
        )
    return [tuple(gpus[n * each : (n + 1) * each]) for n in range(replicas)]


def weights_mib(model: Path) -> int:
    """Size of the weight files of a model folder, MiB."""
    files = (f for kind in ("*.safetensors", "*.gguf", "*.bin") for f in model.glob(kind))
    return sum(file.stat().st_size for file in files) // 2**20


@dataclass(frozen=True)
class Room:
    """What an engine may take.

    Attributes:
        fraction: Share of the GPU's memory to ask for.
        shrunk: Why that is less than the recipe's, with the numbers; ``None`` when it is not.
    """

    fraction: float
    shrunk: str | None = None


def room(gpus: Sequence[Gpu], fraction: float, weights: int, *, free_at_start: bool) -> Room:
    """The recipe's share of memory if it is free, less if the model still fits, and a refusal if not.

    Args:
        gpus: The GPUs of one replica, as they are now.
        fraction: ``serve.memory_fraction``.
        weights: Size of the weight files, MiB, over all of ``gpus``.
        free_at_start: Whether the engine refuses to start when its share is not free (vLLM does; SGLang
            takes its share of what is free).

    Raises:
        EngineError: The weights and the smallest cache do not fit into what is free.
    """
    tightest = min(gpus, key=lambda gpu: gpu.free_mib)
    needed = math.ceil(weights / len(gpus) * OVERHEAD) + SMALLEST_CACHE_MIB
    usable = tightest.free_mib - MARGIN_MIB
    taken = tightest.total_mib - tightest.free_mib
    numbers = (
        f"GPU {tightest.index} has {_gib(tightest.free_mib)} of {_gib(tightest.total_mib)} GiB free "
        f"(others hold {_gib(taken)})"
    )
    if usable < needed:
        raise EngineError(
            f"{numbers}, but the model needs at least {_gib(needed)} GiB there",
            "end what holds it (`nvidia-smi`), serve a quantized model, or choose another GPU "
            "with CUDA_VISIBLE_DEVICES",
        )
    if not free_at_start or usable >= fraction * tightest.total_mib:
        return Room(fraction)
    smaller = math.floor(100 * usable / tightest.total_mib) / 100
    if smaller * tightest.total_mib < needed:
        raise EngineError(
            f"{numbers}, too little for {_gib(needed)} GiB", "end what holds it (`nvidia-smi`)"
        )
    if smaller >= fraction:
        return Room(fraction)
    return Room(smaller, f"{numbers}: serve.memory_fraction {fraction:g} becomes {smaller:g}")


def _gib(mib: float) -> str:
    return f"{mib / 1024:.1f}"
