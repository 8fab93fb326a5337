"""What Prometheus may know. Every label value comes from the table, from the kinds of keys or from a short list here.

============================================  =====================================================
``toolkit_requests_total``                    model, target, key, status (HTTP status; 499: client gone)
``toolkit_errors_total``                      model, target, code (``engine_died``, ``rate_limit_exceeded``, ...)
``toolkit_tokens_total``                      model, target, key, kind (``prompt``, ``completion``)
``toolkit_request_seconds``                   model, target: from the first byte to the last
``toolkit_time_to_first_token_seconds``       model, target: streams only
``toolkit_time_per_output_token_seconds``     model, target: streams only, after the first token
``toolkit_front_seconds``                     model, target: from the first byte until the engine was asked
``toolkit_engine_wait_seconds``               model, target: from asking to the engine's first token (queue, prefill)
``toolkit_in_flight``                         model, target
``toolkit_cache_requests_total``              model, result (``hit``, ``miss``)
``toolkit_ready``, ``toolkit_draining``       0 or 1
``toolkit_target_info``                       model, target, kind, version, run_id: always 1, for what is served now
``toolkit_target_weight``                     model, target: share of traffic, relative
``toolkit_replicas``                          state: engines that are in it
``toolkit_restarts_total``                    part (``front``, ``router``, ``replica-0``): started again
``toolkit_log_dropped_total``                 sink (``access_log``, ``traces``): lines that were lost
============================================  =====================================================

``model`` is a public name, or ``-`` for what never got so far; ``target`` is the label of who answered (``stable``,
``canary``), or ``-``; ``key`` is ``none``, ``jwt``, or the class of the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from toolkit.gateway.exchange import Exchange
from toolkit.gateway.table import STATES, Table

WHO = ("model", "target")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
FRONT_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1, 10, 60)
CODES = frozenset(
    {"auth_unavailable", "client_gone", "context_length_exceeded", "engine_broken", "engine_died",
     "engine_error", "engine_overloaded", "engine_refused", "engine_timeout", "engine_unavailable",
     "host_not_allowed", "origin_not_allowed",
     "integer_above_max_value", "array_above_max_length", "invalid_api_key", "invalid_type", "invalid_value",
     "method_not_allowed", "missing_required_parameter", "model_not_found", "not_allowed", "not_found",
     "not_ready", "not_supported", "overloaded", "rate_limit_exceeded", "request_timeout", "request_too_large",
     "server_stopping", "stream_broken", "unknown_parameter", "unknown_target", "unknown_url", "unsupported_endpoint",
     "authentication_error", "invalid_request_error", "not_found_error", "permission_error",
     "rate_limit_error", "server_error", "timeout_error"}
)  # fmt: skip
"""Values of ``code``; any other is ``other``."""


class _Series:
    """The time series of one model and target, found once."""

    def __init__(self, metrics: Metrics, model: str, target: str) -> None:
        self.request = metrics.seconds.labels(model, target)
        self.first = metrics.first.labels(model, target)
        self.per_token = metrics.per_token.labels(model, target)
        self.front = metrics.front.labels(model, target)
        self.wait = metrics.wait.labels(model, target)
        self.in_flight = metrics.in_flight.labels(model, target)


class _Drops(Collector):
    """Lines that a log or the traces lost: their threads count, a scrape reads."""

    def __init__(self, dropped: Callable[[], Mapping[str, int]]) -> None:
        self._dropped = dropped

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "toolkit_log_dropped", "Lines that were lost.", labels=["sink"]
        )
        for sink, count in self._dropped().items():
            family.add_metric([sink], count)
        yield family


class _Restarts(Collector):
    """Restarts of parts: the supervisor counts, and a front that was started again is told."""

    def __init__(self) -> None:
        self.told: Mapping[str, int] = {}

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "toolkit_restarts", "Parts that were started again.", labels=["part"]
        )
        for part, count in self.told.items():
            family.add_metric([part], count)
        yield family


class Metrics:
    """All series, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests.", *WHO, "key", "status")
        self.errors = self._counter("errors", "Requests that failed.", *WHO, "code")
        self.tokens = self._counter("tokens", "Tokens, as the engine counts.", *WHO, "key", "kind")
        self.cached = self._counter("cache_requests", "Cacheable requests.", "model", "result")
        self.seconds = self._histogram("request", "First byte to last.", SECONDS)
        self.first = self._histogram("time_to_first_token", "Streams: to the first token.", SECONDS)
        self.per_token = self._histogram(
            "time_per_output_token", "Streams: per token after the first.", TOKEN_SECONDS
        )
        self.front = self._histogram("front", "Until the engine was asked.", FRONT_SECONDS)
        self.wait = self._histogram("engine_wait", "Until the engine began to answer.", SECONDS)
        self.in_flight = self._gauge("in_flight", "Requests at the engine.", *WHO)
        self.ready = self._gauge("ready", "Whether /readyz says yes.")
        self.draining = self._gauge("draining", "Whether the server is stopping.")
        self.info = self._gauge(
            "target_info", "What is served now.", *WHO, "kind", "version", "run_id"
        )
        self.weight = self._gauge("target_weight", "Share of traffic, relative.", *WHO)
        self.replicas = self._gauge("replicas", "Engines by state.", "state")
        self.restarts = _Restarts()
        self.registry.register(self.restarts)
        self._series: dict[tuple[str, str], _Series] = {}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"toolkit_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"toolkit_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"toolkit_{name}_seconds", text, WHO, registry=self.registry, buckets=buckets
        )

    def series(self, model: str, target: str) -> _Series:
        """The series of one model and target."""
        found = self._series.get((model, target))
        if found is None:
            found = self._series[model, target] = _Series(self, model, target)
        return found

    def serve(self, table: Table) -> None:
        """Take over what the table says."""
        self.ready.set(table.ready)
        self.info.clear()
        self.weight.clear()
        self.restarts.told = table.restarts
        for state in STATES:
            self.replicas.labels(state).set(table.replicas.get(state, 0))
        for route in table.routes:
            for t in route.targets:
                self.info.labels(route.name, t.label, t.kind, t.version, t.run_id or "").set(1)
                self.weight.labels(route.name, t.label).set(t.weight)

    def finish(self, exchange: Exchange) -> None:
        """Count one request that is over."""
        target = exchange.target.label if exchange.target else "-"
        model, key = exchange.model, exchange.key_class
        self.requests.labels(model, target, key, str(exchange.status)).inc()
        if exchange.code is not None:
            code = exchange.code if exchange.code in CODES else "other"
            self.errors.labels(model, target, code).inc()
        if exchange.cache is not None:
            self.cached.labels(model, exchange.cache).inc()
        if exchange.target is None:
            return
        if exchange.cache != "hit":
            self.tokens.labels(model, target, key, "prompt").inc(exchange.prompt_tokens)
            self.tokens.labels(model, target, key, "completion").inc(exchange.completion_tokens)
        self._times(exchange, self.series(model, target))

    def _times(self, exchange: Exchange, series: _Series) -> None:
        begun, sent = exchange.begun_at, exchange.sent_at
        series.request.observe(exchange.ended_at - begun)
        if sent is not None:
            series.front.observe(sent - begun)
            if exchange.headers_at is not None:
                series.wait.observe((exchange.first_at or exchange.headers_at) - sent)
        if exchange.first_at is not None:
            series.first.observe(exchange.first_at - begun)
        if (per_token := exchange.seconds_per_token) is not None:
            series.per_token.observe(per_token)

    def count_drops(self, dropped: Callable[[], Mapping[str, int]]) -> None:
        """Ask at each scrape how many lines each sink lost."""
        self.registry.register(_Drops(dropped))

    def text(self) -> bytes:
        """The answer of ``/metrics``."""
        return generate_latest(self.registry)
