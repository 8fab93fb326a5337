"""How fast this device multiplies matrices: what MFU is a share of.

Measured, not read from a data sheet: an H100 that is sold with 989 TFLOP/s of bf16 reaches about
800 in its best matrix product, because it lowers its clock under that load. Measured once for each
kind of GPU, version of torch and number format, in a fraction of a second; the number is kept in
the cache folder, and measured anew when its file is removed.

On a CPU there is no MFU: what its cores reach depends on who else computes on them, from one second
to the next (the same product was seen to be 40 times slower on a busy machine).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.train.watch.flops import Format
from toolkit.workspace import cache_root, private_folder

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 8192
"""Rows and columns of the matrices on a GPU: large enough for its best product, 1.1e12 operations."""
ROUNDS = 30
LONGEST_S = 0.25
"""No product is begun after that, on however slow a GPU."""


def peaks(formats: Iterable[Format], device: str) -> dict[Format, float]:
    """Operations per second by format; empty on a CPU, and where one of them cannot be measured.

    Args:
        formats: In which a run multiplies.
        device: ``cpu`` or ``cuda``.
    """
    if device != "cuda":
        return {}
    try:
        return {each: _peak(each) for each in formats}
    except RuntimeError:  # no memory left beside other processes, or a format that it does not have
        return {}


def _peak(each: Format) -> float:
    file = cached(each)
    with contextlib.suppress(OSError, ValueError, KeyError):
        return float(json.loads(file.read_text())["flop_per_second"])
    found = measured(each)
    _keep(file, found)
    return found


def cached(each: Format) -> Path:
    """Where the peak of this process's GPU is kept."""
    import torch

    name = f"{torch.cuda.get_device_name()}-torch-{torch.__version__}-{each}"
    return cache_root() / "matmul-peaks" / f"{re.sub(r'[^A-Za-z0-9.+]+', '-', name)}.json"


def _keep(file: Path, found: float) -> None:
    said = {
        "flop_per_second": found,
        "matrix": SIZE,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a cache that cannot be written: measured again next time
        private_folder(file.parent)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(said))
        part.replace(file)


def measured(each: Format, size: int = SIZE, device: str = "cuda") -> float:
    """Median of some products of random square matrices, operations per second.

    Three pairs take turns, so that none of them is in the GPU's cache. Peaks of memory begin anew
    afterwards, so that a run's own are not hidden behind these matrices.

    Raises:
        RuntimeError: Out of memory, or no such product on this device.
    """
    import torch

    on_gpu = device == "cuda"
    turns = [_product(each, size, device) for _ in range(3)]
    taken = timed(turns, ROUNDS, LONGEST_S, torch.cuda.synchronize if on_gpu else _at_once)
    if on_gpu:
        turns.clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return 2 * size**3 / statistics.median(taken)


def _at_once() -> None:
    """A CPU is done when it says so."""


def timed(
    turns: list[Callable[[], Any]], rounds: int, longest_s: float, wait: Callable[[], None]
) -> list[float]:
    """Seconds of each call after a first round that warms up; at least two."""
    for turn in turns:
        turn()
    wait()
    taken: list[float] = []
    end = time.perf_counter() + longest_s
    while len(taken) < 2 or (len(taken) < rounds and time.perf_counter() < end):
        began = time.perf_counter()
        turns[len(taken) % len(turns)]()
        wait()
        taken.append(time.perf_counter() - began)
    return taken


def _product(each: Format, size: int, device: str) -> Callable[[], Any]:
    """A product of two fixed matrices in a format, as the fast path multiplies."""
    import torch

    dtype = torch.float32 if each == "fp32" else torch.bfloat16
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    return _scaled(left, right) if each == "fp8" else lambda: torch.mm(left, right)


def _scaled(left: Tensor, right: Tensor) -> Callable[[], Any]:
    """The same in FP8 with scales by row, as ``speed/fp8.py`` has them."""
    import torch

    from toolkit.train.speed.fp8 import quantize_rows

    (a, a_scale), (b, b_scale) = quantize_rows(left), quantize_rows(right)
    return lambda: torch._scaled_mm(
        a, b.t(), a_scale[:, None], b_scale[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
    )
