"""Time and memory of one case, written down after every step: a process that is cut off loses nothing."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

MATMUL = 8192
ROUNDS = 30


class Clock:
    """Takes the time at the end of every optimizer step.

    Args:
        file: The case's numbers, rewritten with every step.
        warm: Steps that are not counted.
        steps: Steps that are.
        began: ``time.time()`` when the process was asked for.
        facts: What else the file says.
    """

    def __init__(
        self, file: Path, warm: int, steps: int, began: float, facts: dict[str, Any]
    ) -> None:
        self.file, self.warm, self.steps = file, warm, steps
        self.facts = facts
        self._began = began
        self._since = 0.0
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._losses: list[float] = []
        self._power = Power()

    @property
    def total(self) -> int:
        """Steps to take."""
        return self.warm + self.steps

    def built(self) -> None:
        """The model and the optimizer are there; what follows is the first step."""
        synchronize()
        self.facts["seconds_to_model"] = round(time.time() - self._began, 2)
        self.facts["memory_of_model_gib"] = memory().get("allocated_gib")
        self._power.start()
        self._since = time.perf_counter()

    def tick(self, tokens: int, loss: float | None = None) -> None:
        """A step has ended; ``tokens`` of it were no padding."""
        synchronize()
        if not self._tokens:
            self.facts["seconds_to_first_step"] = round(time.time() - self._began, 2)
        self._seconds.append(round(time.perf_counter() - self._since, 4))
        self._tokens.append(tokens)
        if loss is not None:
            self._losses.append(round(loss, 5))
        if len(self._tokens) == self.warm:
            self._power.begin()
        elif len(self._tokens) > self.warm:
            self._power.step(tokens)
        self.write()
        self._since = time.perf_counter()  # what was written down is not the step's

    def write(self) -> None:
        """Write all that is known so far."""
        found = self.facts | memory() | self._speed() | self._power.numbers()
        self.file.write_text(json.dumps(found, indent=1))

    def _speed(self) -> dict[str, Any]:
        seconds = self._seconds
        counted, tokens = seconds[self.warm :], self._tokens[self.warm :]
        if not seconds:
            return {}
        found: dict[str, Any] = {"warm_step_s": seconds[: self.warm], "step_s": counted}
        if self._losses:
            found["losses"] = self._losses
        if counted:
            found["tokens_per_s"] = round(_rate(counted, tokens), 1)
            found["tokens_per_step"] = round(statistics.mean(tokens))
        return found


class Power:
    """What the driver says of the GPU over the steps that are counted; nothing where it says nothing."""

    def __init__(self) -> None:
        self._gpus: Any = None
        self._seen: list[dict[str, float]] = []
        self._tokens = 0
        self._joules = 0.0

    def start(self) -> None:
        """Begin to look: the GPU is open by now."""
        import torch

        from toolkit.train.watch.gpus import watch_gpus

        self._gpus = watch_gpus(1) if torch.cuda.is_available() else None

    def begin(self) -> None:
        """The next step counts."""
        if self._gpus:
            self._gpus.take()
            self._joules = self._gpus.joules

    def step(self, tokens: int) -> None:
        """A step that counts has ended."""
        self._tokens += tokens
        if self._gpus:
            self._seen.append(self._gpus.take())

    def numbers(self) -> dict[str, float]:
        """Means over the counted steps, and energy for what was trained."""
        if not self._seen or not self._gpus:
            return {}
        names = {name for one in self._seen for name in one}
        found = {
            name: round(statistics.mean(one[name] for one in self._seen if name in one), 1)
            for name in sorted(names)
        }
        joules = self._gpus.joules - self._joules
        if joules:
            found["wh_per_million_tokens"] = round(joules / 3600 / self._tokens * 1e6, 1)
        return found


def _rate(seconds: list[float], tokens: list[int]) -> float:
    """Tokens over the median step when all steps are alike, over all seconds when they are not."""
    if len(set(tokens)) == 1:
        return tokens[0] / statistics.median(seconds)
    return sum(tokens) / sum(seconds)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> dict[str, float]:
    """Peaks of the allocator, and what the device says is taken, CUDA's context included."""
    import torch

    if not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    values = {
        "allocated_gib": torch.cuda.memory_allocated(),
        "peak_allocated_gib": torch.cuda.max_memory_allocated(),
        "peak_reserved_gib": torch.cuda.max_memory_reserved(),
        "device_used_gib": total - free,
    }
    return {name: round(value / 2**30, 2) for name, value in values.items()}


def matmul_tflops(device: str, size: int = MATMUL) -> dict[str, float]:
    """The peak that MFU is a share of: bf16 products of random square matrices, median of 30.

    Three pairs take turns, so that none of them is in the cache.
    """
    import torch

    pairs = [[torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab"]
             for _ in range(3)]  # fmt: skip
    seconds = []
    for turn in range(ROUNDS + 5):
        left, right = pairs[turn % 3]
        synchronize()
        began = time.perf_counter()
        torch.mm(left, right)
        synchronize()
        seconds.append(time.perf_counter() - began)
    taken = sorted(seconds[5:])
    return {
        "bf16_matmul_tflops": round(2 * size**3 / statistics.median(taken) / 1e12, 1),
        "bf16_matmul_best_tflops": round(2 * size**3 / taken[0] / 1e12, 1),
        "matrix": size,
    }
