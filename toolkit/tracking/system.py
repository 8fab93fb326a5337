"""System metrics of a step, under the names that MLflow's own monitor uses.

MLflow's monitor ends at the first unanswered call and needs all of MLflow imported before its first
sample; this one only writes to the outbox.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import psutil

PEAK_EVERY_S = 1.0
"""How often memory is looked at for the peak."""

LOG_EVERY_S = 10.0
"""How often values are logged."""

MEGA = 1e6
"""MLflow's megabyte."""


class SystemSampler:
    """Samples the host, and the memory of this process's children, until :meth:`stop`.

    Args:
        log: Called with a counter and metrics (``system/...``).
    """

    def __init__(self, log: Callable[[int, Mapping[str, float]], None]) -> None:
        self._log = log
        self._stopped = threading.Event()
        self._peak_bytes = 0
        self._host = Host()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    @property
    def peak_gib(self) -> float:
        """Largest resident memory of the children together; a page that two share counts twice."""
        return self._peak_bytes / 2**30

    def stop(self) -> None:
        """Log a last sample and end."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        looks, count = 0, 0
        while not self._stopped.wait(PEAK_EVERY_S if looks else 0):
            self._peak_bytes = max(self._peak_bytes, children_bytes())
            looks += 1
            if looks % round(LOG_EVERY_S / PEAK_EVERY_S) == 0:
                self._publish(count)
                count += 1
        self._publish(count)

    def _publish(self, count: int) -> None:
        values = self._host.sample() | {"step_peak_memory_megabytes": self._peak_bytes / MEGA}
        self._log(count, {f"system/{key}": round(value, 1) for key, value in values.items()})


class Host:
    """Load of this machine; disk and network traffic count from the making of this value."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call only starts the clock
        self._traffic = psutil.net_io_counters()
        self._gpus = _gpus()

    def sample(self) -> dict[str, float]:
        """Values now, by MLflow's names without ``system/``."""
        memory, disk, net = (
            psutil.virtual_memory(),
            psutil.disk_usage("/"),
            psutil.net_io_counters(),
        )
        host = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGA,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_megabytes": disk.used / MEGA,
            "disk_available_megabytes": disk.free / MEGA,
            "disk_usage_percentage": disk.percent,
            "network_receive_megabytes": (net.bytes_recv - self._traffic.bytes_recv) / MEGA,
            "network_transmit_megabytes": (net.bytes_sent - self._traffic.bytes_sent) / MEGA,
        }
        for index, gpu in enumerate(self._gpus):
            host |= {f"gpu_{index}_{key}": value for key, value in _gpu_sample(gpu).items()}
        return host


def children_bytes() -> int:
    """Resident memory of all processes under this one, in bytes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            total += process.memory_info().rss
    return total


def _gpus() -> list[Any]:
    """Handles of the NVIDIA GPUs, if there are any and ``nvidia-ml-py`` is installed."""
    if find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu_sample(gpu: Any) -> dict[str, float]:
    import pynvml

    sample: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):  # some cards do not tell everything
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        sample["memory_usage_megabytes"] = memory.used / MEGA
        sample["memory_usage_percentage"] = memory.used / memory.total * 100
        sample["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        sample["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return sample
