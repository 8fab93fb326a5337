"""The GPU itself: the rate of its bf16 matrix products."""

from __future__ import annotations

from pathlib import Path

from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock, matmul_tflops


def measure(case: Case, _batch: int, _folder: Path, clock: Clock) -> None:
    """No training: what MFU is a share of."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock.facts |= matmul_tflops(device, 256 if case.shape == "tiny" else 8192)
