"""System metrics of a step, under the names that MLflow's own monitor uses.

MLflow's monitor ends at the first unanswered call: its probes are used here, its loop is not.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from toolkit.tracking import client

PEAK_EVERY_S = 1.0
"""How often memory is looked at for the peak."""

LOG_EVERY_S = 10.0
"""How often means are logged."""


class SystemSampler:
    """Samples the host, and the memory of this process's children, until :meth:`stop`.

    Args:
        log: Called with a counter and metrics (``system/...``; a megabyte is 10^6 bytes, as in
            MLflow).
    """

    def __init__(self, log: Callable[[int, Mapping[str, float]], None]) -> None:
        self._log = log
        self._stopped = threading.Event()
        self._peak_bytes = 0
        self._count = 0
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    @property
    def peak_gib(self) -> float:
        """Largest resident memory of the children together; a page that two share counts twice."""
        return self._peak_bytes / 2**30

    def stop(self) -> None:
        """Log a last sample and end."""
        self._stopped.set()
        self._thread.join(timeout=PEAK_EVERY_S * 5)

    def _work(self) -> None:
        probes = _probes()
        looks = round(LOG_EVERY_S / PEAK_EVERY_S)
        while not self._stopped.is_set():
            for look in range(looks):
                self._peak_bytes = max(self._peak_bytes, children_bytes())
                if look in (0, looks // 2):
                    for probe in probes:
                        probe.collect_metrics()
                if self._stopped.wait(PEAK_EVERY_S):
                    break
            self._publish(probes)

    def _publish(self, probes: list[Any]) -> None:
        means = {
            f"system/{key}": value
            for probe in probes
            for key, value in probe.aggregate_metrics().items()
        }
        for probe in probes:
            probe.clear_metrics()
        means["system/step_peak_memory_megabytes"] = round(self._peak_bytes / 1e6, 1)
        self._log(self._count, means)
        self._count += 1


def children_bytes() -> int:
    """Resident memory of all processes under this one, in bytes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended while we looked
            continue
    return total


def _probes() -> list[Any]:
    client.quiet()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    probes = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # no NVML package or no NVIDIA GPU
        probes.append(GPUMonitor())
    return probes
