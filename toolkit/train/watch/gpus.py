"""What the driver says of the GPUs that train: utilisation, power, energy. Missing is left out, silently.

NVML is asked through ``nvidia-ml-py``; where an interpreter lacks it (a GPU host with packages of
its own), the program ``nvidia-smi`` is.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean
from typing import Any

PERIOD_S = 1.0
"""Seconds between two looks; the driver's own numbers are means of about as long."""

SMI_PERIOD_S = 2.0
"""The same for ``nvidia-smi``, which is a new process every time."""

SMI_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Look:
    """One look at all GPUs of a process's machine that train; ``None`` is what they do not tell."""

    utilization_percentage: float | None = None
    """Share of the last second in which a kernel ran, mean over the GPUs."""
    power_watts: float | None = None
    """All together."""
    energy_joules: float | None = None
    """All together, since the driver was loaded."""


Reader = Callable[[], Look | None]


class Gpus:
    """Looks at GPUs in a thread until :meth:`stop`; costs the step loop nothing.

    Args:
        read: Gives a look, or ``None`` when it cannot; then this ends.
        period_s: Time between two looks.
    """

    def __init__(self, read: Reader, period_s: float = PERIOD_S) -> None:
        self._read, self._period_s = read, period_s
        self._lock = threading.Lock()
        self._seen: list[Look] = []
        self._last: Look | None = None
        self._joules = 0.0
        self._at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="gpu-watch", daemon=True)
        self._thread.start()

    @property
    def joules(self) -> float:
        """Energy since the start: of the driver's counter, or power times time."""
        with self._lock:
            return self._joules

    @property
    def last(self) -> Look:
        """The newest look."""
        return self._last or Look()

    def take(self) -> dict[str, float]:
        """Means since the last call, by the names of MLflow's own monitor; the newest look if none came since."""
        with self._lock:
            looks = self._seen or ([self._last] if self._last else [])
            self._seen = []
        return _named(looks)

    def stop(self) -> None:
        """Look once more, and end."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            stopping = self._stopped.is_set()
            look = self._read()
            if look is None:
                return
            self._add(look)
            if stopping:
                return
            self._stopped.wait(self._period_s)

    def _add(self, look: Look) -> None:
        now = time.monotonic()
        with self._lock:
            before, self._last = self._last, look
            if before is not None:
                self._joules += _between(before, look, now - self._at)
            self._at = now
            self._seen.append(look)


def _between(before: Look, after: Look, seconds: float) -> float:
    """Joules between two looks."""
    if before.energy_joules is not None and after.energy_joules is not None:
        return max(0.0, after.energy_joules - before.energy_joules)
    known = [look.power_watts for look in (before, after) if look.power_watts is not None]
    return fmean(known) * seconds if known else 0.0


def _named(looks: Sequence[Look]) -> dict[str, float]:
    used = [v for look in looks if (v := look.utilization_percentage) is not None]
    power = [v for look in looks if (v := look.power_watts) is not None]
    found = {"gpu_utilization_percentage": used, "gpu_power_usage_watts": power}
    return {name: fmean(values) for name, values in found.items() if values}


def watch_gpus(count: int) -> Gpus | None:
    """Watch the first ``count`` GPUs that this process sees; ``None`` where nothing tells of them."""
    names = uuids(count)
    if not names:
        return None
    read = nvml(names)
    return Gpus(read) if read else Gpus(smi(names), SMI_PERIOD_S)


def uuids(count: int) -> list[str]:
    """Names of CUDA's devices that the driver knows too: both number them in their own way."""
    import torch

    found = [getattr(torch.cuda.get_device_properties(i), "uuid", None) for i in range(count)]
    return [f"GPU-{name}" for name in found if name is not None]


def local_gpus() -> int:
    """How many GPUs train on this machine: torchrun says, or it is one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def nvml(names: Sequence[str]) -> Reader | None:
    """Reads through ``nvidia-ml-py``; ``None`` where it is missing or finds no driver."""
    if find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
    except pynvml.NVMLError:  # a part of a GPU (MIG) has no such name
        return None

    def told(ask: Callable[[Any], Any]) -> list[float] | None:
        try:
            return [float(ask(handle)) for handle in handles]
        except pynvml.NVMLError:  # some cards do not tell everything
            return None

    def read() -> Look:
        used = told(lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        milliwatts = told(pynvml.nvmlDeviceGetPowerUsage)
        millijoules = told(pynvml.nvmlDeviceGetTotalEnergyConsumption)
        return Look(
            fmean(used) if used else None,
            sum(milliwatts) / 1000 if milliwatts else None,
            sum(millijoules) / 1000 if millijoules else None,
        )

    return read


def smi(names: Sequence[str]) -> Reader:
    """Reads through the program ``nvidia-smi``."""
    command = [
        *("nvidia-smi", f"--id={','.join(names)}"),
        *("--query-gpu=utilization.gpu,power.draw", "--format=csv,noheader,nounits"),
    ]

    def read() -> Look | None:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return parse(done.stdout) if done.returncode == 0 else None

    return read


def parse(text: str) -> Look | None:
    """Lines of ``percent, watts``, one for each GPU; ``[N/A]`` is what a card does not tell."""
    rows = [[_number(cell) for cell in line.split(",")] for line in text.strip().splitlines()]
    if not rows or any(len(row) != 2 for row in rows):
        return None
    used = [row[0] for row in rows if row[0] is not None]
    power = [row[1] for row in rows if row[1] is not None]
    return Look(
        fmean(used) if len(used) == len(rows) else None,
        sum(power) if len(power) == len(rows) else None,
    )


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
