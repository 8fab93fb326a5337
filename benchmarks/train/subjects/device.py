"""The GPU itself: the rate of its matrix products."""

from __future__ import annotations

from pathlib import Path

from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock, matmul_tflops


def measure(case: Case, _batch: int, _folder: Path, clock: Clock) -> None:
    """No training: what MFU is a share of."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock.facts |= matmul_tflops(device, 256 if case.shape == "tiny" else 8192)
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        from toolkit.train.watch import peak

        clock.facts["fp8_matmul_tflops"] = round(peak.measured("fp8") / 1e12, 1)
        clock.facts["bf16_as_the_toolkit_measures_tflops"] = round(peak.measured("bf16") / 1e12, 1)
