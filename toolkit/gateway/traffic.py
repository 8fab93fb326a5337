"""What is going on: the table, the open requests, and whether the server is stopping."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from toolkit.gateway.exchange import Exchange
from toolkit.gateway.metrics import Metrics
from toolkit.gateway.openai import ApiError
from toolkit.gateway.table import Route, Table, Target

STARTING = Table(None, (), 0, ready=False, reason="starting")


class Traffic:
    """State of one front; all of it lives in the event loop, so nothing is locked.

    Attributes:
        table: What is served; replaced as a whole.
        in_flight: Open requests by ``model_id`` of the engine.
        open: All open requests, those too that did not reach the engine yet.
        requests: Requests since the start.
        draining: New requests are refused.
        over: Set when the server may end: it drained.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.table = STARTING
        self.in_flight: Counter[str] = Counter()
        self.open: set[Exchange] = set()
        self.requests = 0
        self.started = time.time()
        self.draining = False
        self.over = asyncio.Event()
        self._metrics = metrics
        self._deadline: asyncio.TimerHandle | None = None

    def serve(self, table: Table) -> None:
        """Take a new table; open requests keep what they began with."""
        self.table = table
        self._metrics.serve(table)

    def enter(self, exchange: Exchange) -> None:
        """A request begins."""
        self.requests += 1
        self.open.add(exchange)

    def leave(self, exchange: Exchange) -> None:
        """A request is over."""
        self.open.discard(exchange)
        if self.draining and not self.open:
            self.over.set()

    def take(self, exchange: Exchange, target: Target) -> None:
        """A request goes to a target: from here on it counts, before anything is waited for."""
        exchange.target = target
        self.in_flight[target.model_id] += 1
        self._metrics.series(exchange.model, target.label).in_flight.inc()

    def give_back(self, exchange: Exchange) -> None:
        """The target has nothing more to do with it."""
        if exchange.target is None:
            return
        name = exchange.target.model_id
        self.in_flight[name] -= 1
        if not self.in_flight[name]:
            del self.in_flight[name]
        self._metrics.series(exchange.model, exchange.target.label).in_flight.dec()

    def drain(self, deadline_s: float) -> None:
        """Refuse what is new and let what is open finish; what is left at the deadline is told and ended.

        May be said again: the earlier deadline counts.
        """
        self.draining = True
        self._metrics.ready.set(0)
        self._metrics.draining.set(1)
        loop = asyncio.get_running_loop()
        ends = loop.time() + max(0.0, deadline_s)
        if self._deadline is None or ends < self._deadline.when():
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = loop.call_at(ends, self.end_now)
        if not self.open:
            self.over.set()

    def end_now(self) -> None:
        """Break off what is open, with an error that says so."""
        for exchange in tuple(self.open):
            exchange.stop("server")
        self.over.set()


def choose(route: Route, wanted: str | None) -> Target:
    """The target of a request: the one that its header names, or one by weight.

    Raises:
        ApiError: 400, the header names none.
    """
    if wanted:
        for target in route.targets:
            if target.label == wanted:
                return target
        labels = ", ".join(target.label for target in route.targets)
        raise ApiError(
            400,
            f"The model `{route.name}` has no target {wanted!r} here; it has: {labels}. "
            "Leave the x-toolkit-target header out to get any.",
            code="unknown_target",
            param="x-toolkit-target",
        )
    if len(route.targets) == 1:
        return route.targets[0]
    weights = [target.weight for target in route.targets]
    if not any(weights):
        return route.targets[0]
    return random.choices(route.targets, weights)[0]  # noqa: S311 - a share of traffic, no secret
