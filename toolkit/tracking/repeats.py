"""Points that a run has already.

Who goes on from a checkpoint logs again what was logged before it, and does again what was done behind it.

Read only where a run is gone on with, each metric once, when it comes first; a new run asks for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

LARGEST = 1.7976931348623157e308
"""What MLflow stores for infinity."""


class Logged:
    """What a run shows, by metric and step: the last value there."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._keys = set(client.get_run(run_id).data.metrics)
        self._values: dict[str, dict[int, str]] = {}

    def new(self, metrics: Iterable[Any]) -> list[Any]:
        """Those that say something new: another step, or another value at a step. A model's own always do."""
        return [metric for metric in metrics if metric.model_id or self._is_new(metric)]

    def _is_new(self, metric: Any) -> bool:
        values, value = self._of(metric.key), stored(metric.value)
        if values.get(metric.step) == value:
            return False
        values[metric.step] = value
        return True

    def _of(self, key: str) -> dict[int, str]:
        if key not in self._values:
            known = key in self._keys
            points = self._client.get_metric_history(self._run_id, key) if known else ()
            by_time = sorted(points, key=lambda point: point.timestamp)
            self._values[key] = {point.step: stored(point.value) for point in by_time}
        return self._values[key]


def stored(value: float) -> str:
    """A value as MLflow gives it back; NaN equals NaN."""
    value = float(value)
    return repr(math.copysign(LARGEST, value) if math.isinf(value) else value)
