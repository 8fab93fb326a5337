"""What a probe writes down, and how it takes the time."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any


class Book:
    """``probe.jsonl``: one line per measurement, written as it is taken.

    Args:
        out: The folder.
        budget: Seconds for the whole call.
    """

    def __init__(self, out: Path, budget: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self._budget, self._began = out, budget, time.monotonic()

    def left(self) -> float:
        """Seconds that are left."""
        return self._budget - (time.monotonic() - self._began)

    def add(self, **row: object) -> None:
        """Write a line, with the seconds since the beginning."""
        line = json.dumps(row | {"at_s": round(time.monotonic() - self._began, 1)})
        with (self.out / "probe.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def take(
        self, part: str, name: str, measured: Callable[[], Mapping[str, Any]], **about: object
    ) -> None:
        """Measure and write, or write why not: one that fails must not cost the others."""
        try:
            self.add(part=part, name=name, **about, **measured())
        except Exception as error:  # noqa: BLE001 - the line says it, and the next is taken
            self.add(part=part, name=name, **about, error=f"{type(error).__name__}: {error}"[:400])


def milliseconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Of the median of ``repeats`` on the GPU, after one that is not counted."""
    import torch

    work()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    return times[len(times) // 2]


def forget() -> None:
    """Give the GPU's memory back between two measurements."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._cuda_clearCublasWorkspaces()
