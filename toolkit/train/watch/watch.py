"""What the step loop tells, and what it gets back: numbers of the steps since they were last asked for.

Nothing here waits for the GPU. Counters of the allocator are read at most once a second, the driver
is asked in a thread, and what a step's useful work is comes from the lengths of its rows.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Self

from toolkit.stages import StageContext
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.watch.flops import Format, Work
from toolkit.train.watch.gpus import Gpus, local_gpus, watch_gpus
from toolkit.train.watch.peak import peaks
from toolkit.train.watch.profile import Recorder
from toolkit.train.watch.window import Window

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from toolkit.train.checkpoint import Position

RECENT = 20
"""Steps that the progress line's speed and the time left are means of."""

PEAKS = ("peak_gpu_memory_gib", "peak_memory_gib")
"""Of the figures of memory, those that stand in the progress line."""

MEMORY_EVERY_S = 1.0
JOULES_OF_KWH = 3.6e6


@dataclass(frozen=True)
class Taken:
    """What a step, or several, took."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    ideal_s: float = 0.0
    """Seconds that its useful work takes at the measured peak."""

    def __add__(self, other: Taken) -> Taken:
        """Both together."""
        return Taken(
            self.steps + other.steps,
            self.seconds + other.seconds,
            self.tokens + other.tokens,
            self.ideal_s + other.ideal_s,
        )

    @property
    def speed(self) -> dict[str, float]:
        """Tokens per second, and MFU where the work is known."""
        if not self.seconds:
            return {}
        found = {"tokens_per_second": self.tokens / self.seconds}
        if self.ideal_s:
            found["mfu_percentage"] = 100 * self.ideal_s / self.seconds
        return found


@dataclass(frozen=True)
class Limit:
    """What a run's steps are held against: its work, and the measured peak of each device.

    Empty where the base is no dense decoder, or the objective is another than SFT: what is useful
    there has no one answer, and MFU is left out.
    """

    work: Work | None = None
    peaks: dict[Format, float] | None = None
    ranks: int = 1

    @classmethod
    def measure(cls, work: Work | None, ranks: Ranks, ctx: StageContext) -> Self:
        """Measure the peak, or read it from the cache: before the model takes the memory."""
        if work is None or not ranks.first:
            return cls()
        found = peaks(work.formats, ctx.device)
        if not found:
            return cls()
        shown = ", ".join(f"{name} {flop / 1e12:,.1f} TFLOP/s" for name, flop in found.items())
        ctx.note(f"matrix products reach {shown} on this device: MFU is the share of that")
        return cls(work, found, ranks.count)

    def ideal_s(self, lengths: NDArray[np.int64], trained: int) -> float:
        """Seconds that a step takes when every device does nothing but useful work at its peak."""
        if self.work is None or self.peaks is None:
            return 0.0
        flop = self.work.of(lengths, trained)
        return sum(n / self.peaks[each] for each, n in flop.items()) / self.ranks


class Watch(AbstractContextManager["Watch"]):
    """Watches one run; entered around its steps. Every rank has one, the first one speaks.

    Args:
        limit: What MFU is held against.
        ranks: This process among all.
        ctx: Where notes and a profile go.
        position: What earlier processes did, and used.
        total: Steps of the whole run.

    Raises:
        UsageError: ``--profile-steps`` lies beyond the last step.
    """

    def __init__(
        self, limit: Limit, ranks: Ranks, ctx: StageContext, position: Position, total: int
    ) -> None:
        self._limit, self._ranks, self._ctx = limit, ranks, ctx
        self._done, self._total = position.step, total
        self._kwh = position.energy_kwh
        self._recent: deque[Taken] = deque(maxlen=RECENT)
        self._sum: Taken | None = None  # of them, once asked for
        self._unsaid, self._first, self._later = Taken(), Taken(), Taken()
        self._memory: dict[str, float] = {}
        self._memory_at = 0.0
        self._gpus: Gpus | None = None
        self._gpu: dict[str, float] = {}
        self._all_gpu: list[dict[str, float]] = []
        self._kept_joules = 0.0
        self._recorder = self._recorded()

    def _recorded(self) -> Recorder | None:
        if self._ctx.profile_steps is None:
            return None
        window = Window(*self._ctx.profile_steps)
        window.insist_before(self._total, "the last step is")
        return Recorder(window, self._done, self._ctx) if self._ranks.first else None

    def __enter__(self) -> Self:
        """Start to look at the GPUs: one process on each machine does."""
        if self._ctx.device == "cuda" and self._ranks.local == 0:
            self._gpus = watch_gpus(local_gpus())
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._recorder:
            self._recorder.drop()
        if self._gpus:
            self._gpus.stop()

    def begin(self, step: int) -> None:
        """Step ``step`` begins, counted from 1."""
        if self._recorder:
            self._recorder.before(step)

    def end(
        self,
        step: int,
        seconds: float,
        tokens: int,
        lengths: NDArray[np.int64] | None = None,
        trained: int = 0,
    ) -> None:
        """Step ``step`` is over.

        Args:
            step: Which, from 1.
            seconds: How long it took.
            tokens: Its tokens over all ranks, without padding.
            lengths: Tokens of each of its rows.
            trained: Its trained tokens.
        """
        if self._recorder:
            self._recorder.after(step)
        self._done = step
        ideal = 0.0 if lengths is None else self._limit.ideal_s(lengths, trained)
        taken = Taken(1, seconds, tokens, ideal)
        self._unsaid += taken
        if not self._first.steps:
            self._first = taken
            return
        self._later += taken
        self._recent.append(taken)
        self._sum = None

    def numbers(self) -> dict[str, float]:
        """Metrics of the steps since the last call; all but the counters are means over them."""
        taken, self._unsaid = self._unsaid, Taken()
        self._look()
        if self._gpus:
            self._gpu = self._gpus.take()
            self._all_gpu.append(self._gpu)
        found = {"step_s": taken.seconds / max(1, taken.steps), **taken.speed, "eta_s": self.left_s}
        found |= self._memory | self._gpu
        if self._gpus and self._gpus.joules:
            found["energy_kwh"] = (
                self._kwh + (self._gpus.joules - self._kept_joules) / JOULES_OF_KWH
            )
        return found

    def shown(self) -> dict[str, float]:
        """What stands in the progress line: means over the last :data:`RECENT` steps."""
        self._look()
        found = {"eta_s": self.left_s, **self._lately.speed}
        found |= {k: v for k, v in self._memory.items() if k in PEAKS}
        look = self._gpus.last if self._gpus else None
        if look and look.utilization_percentage is not None:
            found["gpu_utilization_percentage"] = look.utilization_percentage
        if look and look.power_watts is not None:
            found["gpu_power_usage_watts"] = look.power_watts
        return found

    @property
    def left_s(self) -> float:
        """Seconds until the last step, at the speed of the last ones; without held-out losses."""
        lately = self._lately
        return lately.seconds / max(1, lately.steps) * (self._total - self._done)

    def settle(self, position: Position) -> None:
        """Write the energy so far into ``position``: of the GPUs of all machines. All ranks must call."""
        if self._ctx.device != "cuda":
            return
        joules = self._gpus.joules if self._gpus else 0.0
        (found,) = self._ranks.total(joules - self._kept_joules)
        self._kept_joules = joules
        self._kwh += found / JOULES_OF_KWH
        position.energy_kwh = self._kwh

    def summary(self) -> dict[str, float]:
        """Final numbers of this process's steps: MFU without its first one, which compiles."""
        steady = (self._later if self._later.steps else self._first).speed
        found = {k: v for k, v in steady.items() if k == "mfu_percentage"}
        if self._kwh:
            found["energy_kwh"] = self._kwh
        for name in {name for one in self._all_gpu for name in one}:
            found[name] = fmean(one[name] for one in self._all_gpu if name in one)
        return found

    @property
    def _lately(self) -> Taken:
        """The last steps; the first one only until there are others, because it compiles."""
        if not self._recent:
            return self._first
        if self._sum is None:
            self._sum = Taken(
                len(self._recent),
                sum(taken.seconds for taken in self._recent),
                sum(taken.tokens for taken in self._recent),
                sum(taken.ideal_s for taken in self._recent),
            )
        return self._sum

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._memory_at >= MEMORY_EVERY_S or self._done == self._total:
            self._memory_at = now
            self._memory = memory(self._ctx.device)


def memory(device: str) -> dict[str, float]:
    """Memory now and at its peak, GiB: of PyTorch on the GPU, or of this process.

    ``gpu_memory_gib`` is what tensors hold between two steps, ``gpu_memory_reserved_gib`` the peak
    of what the allocator took from the device for them.
    """
    if device == "cuda":
        import torch

        stats = torch.cuda.memory_stats()
        found = {
            "gpu_memory_gib": stats.get("allocated_bytes.all.current", 0),
            "peak_gpu_memory_gib": stats.get("allocated_bytes.all.peak", 0),
            "gpu_memory_reserved_gib": stats.get("reserved_bytes.all.peak", 0),
        }
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        now = pages * resource.getpagesize()
        peak_kib = resource.getrusage(
            resource.RUSAGE_SELF
        ).ru_maxrss  # Linux counts KiB, not at once
        found = {"memory_gib": now, "peak_memory_gib": max(now, peak_kib * 1024)}
    return {name: size / 2**30 for name, size in found.items()}
