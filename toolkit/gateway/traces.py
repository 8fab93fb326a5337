"""A trace of each request in MLflow, written by a thread: an outage of the store costs traces, never traffic."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from toolkit.gateway.access_log import line
from toolkit.gateway.background import Background
from toolkit.gateway.exchange import Exchange

WAITING = 1000
"""Traces that may wait for the store; more are dropped and counted."""
PAUSE_S = 5.0
"""After a failure the store is not asked for this time."""

log = logging.getLogger(__name__)


class Traces(Background):
    """Writes to the experiment ``serving/NAME``."""

    def __init__(self, tracking_uri: str, name: str) -> None:
        super().__init__("traces", WAITING)
        self._uri, self._experiment_name = tracking_uri, f"serving/{name}"
        self._client: Any = None
        self._experiment = ""
        self._paused_until = 0.0

    def start(self) -> None:
        """Import MLflow (seconds) and open the store, before there is traffic; a store that is away is asked later."""
        self._try(self._connect)
        super().start()

    def handle(self, exchanges: list[Exchange]) -> int:
        """Write one after the other."""
        return sum(not self._try(self._write, exchange) for exchange in exchanges)

    def _try(self, step: Any, *arguments: Any) -> bool:
        if time.monotonic() < self._paused_until:
            return False
        try:
            step(*arguments)
        except Exception as error:  # noqa: BLE001 - stores raise anything, and the thread must live on
            self._paused_until = time.monotonic() + PAUSE_S
            log.warning("MLflow takes no traces: %s: %s", type(error).__name__, error)
            return False
        return True

    def _connect(self) -> None:
        from toolkit.tracking.client import quiet

        os.environ.setdefault(
            "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false"
        )  # we have our own thread
        quiet()
        import mlflow
        from mlflow.tracking import MlflowClient

        mlflow.set_tracking_uri(self._uri)
        client = MlflowClient(self._uri)
        found = client.get_experiment_by_name(self._experiment_name)
        self._experiment = (
            found.experiment_id if found else client.create_experiment(self._experiment_name)
        )
        self._client = client

    def _write(self, exchange: Exchange) -> None:
        if self._client is None:
            self._connect()
        values = line(exchange)
        inputs, outputs = values.pop("request", None), values.pop("answer", None)
        begun = int(exchange.time * 1e9)
        span = self._client.start_trace(
            exchange.path,
            span_type="LLM",
            inputs=inputs,
            attributes={k: v for k, v in values.items() if v is not None},
            tags={
                "request_id": exchange.id,
                "model": exchange.model,
                "version": values["version"] or "-",
            },
            experiment_id=self._experiment,
            start_time_ns=begun,
        )
        self._client.end_trace(
            span.trace_id,
            outputs=outputs,
            status="OK" if exchange.code is None else "ERROR",
            end_time_ns=begun + int((exchange.ended_at - exchange.begun_at) * 1e9),
        )
