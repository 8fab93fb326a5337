"""The way of a request that ends at an engine: admitted, read, sent on, counted, whatever happens."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from toolkit.gateway import caps, refusals
from toolkit.gateway.access import Access, Admission
from toolkit.gateway.cache import HEADER, Cache, certificate_digest, is_deterministic, key_of
from toolkit.gateway.caps import Asked
from toolkit.gateway.exchange import Exchange
from toolkit.gateway.http import JSON, ClientGoneError, Headers, Request, Send, refuse, respond
from toolkit.gateway.limits import estimate_tokens
from toolkit.gateway.metrics import Metrics
from toolkit.gateway.openai import ApiError, no_such_model
from toolkit.gateway.proxy import Call, forward, stopping
from toolkit.gateway.sse import usage_of
from toolkit.gateway.table import Table, Target
from toolkit.gateway.traffic import Traffic, choose
from toolkit.gateway.upstream import Upstream
from toolkit.recipe.front import FrontSection


class Sink(Protocol):
    """Takes requests that are over; never waits, never raises."""

    def put(self, exchange: Exchange) -> None:
        """Take one."""


@dataclass
class Parts:
    """What a front is made of; opened and closed by whoever runs it."""

    access: Access
    upstream: Upstream
    traffic: Traffic
    metrics: Metrics
    cache: Cache | None = None
    sinks: list[Sink] = field(default_factory=list)

    def finish(self, exchange: Exchange) -> None:
        """Count and write down a request that is over."""
        exchange.ended_at = exchange.ended_at or time.perf_counter()
        self.metrics.finish(exchange)
        for sink in self.sinks:
            sink.put(exchange)


class Generation:
    """Serves ``POST`` to the paths of :data:`toolkit.gateway.requests.BODIES`."""

    def __init__(self, section: FrontSection, parts: Parts) -> None:
        self.section = section
        self.parts = parts
        self._certificate: tuple[Table | None, str] = (None, "")

    async def __call__(self, request: Request, exchange: Exchange, send: Send) -> None:
        """Serve one request."""
        await _Visit(self, request, exchange, send).run()

    def certificate(self, table: Table) -> str:
        """The digest of a table's certificate, worked out once for each table."""
        if self._certificate[0] is not table:
            self._certificate = (table, certificate_digest(table))
        return self._certificate[1]


class _Visit:
    """One request on its way."""

    def __init__(
        self, generation: Generation, request: Request, exchange: Exchange, send: Send
    ) -> None:
        self.generation = generation
        self.section, self.parts = generation.section, generation.parts
        self.traffic = generation.parts.traffic
        self.request, self.exchange, self.send = request, exchange, send
        self.admission: Admission | None = None

    async def run(self) -> None:
        exchange = self.exchange
        try:
            self.enter()
            self.admission = await self.parts.access.admit(self.request.headers, None)
            await self.admitted(self.admission)
        except ApiError as error:
            await self.refuse(error)
        except ClientGoneError:
            exchange.gone()
        except asyncio.CancelledError:
            if exchange.stopped_by is None:
                raise
            await self.stopped()
        finally:
            exchange.task = None
            self.traffic.leave(exchange)
            self.parts.finish(exchange)
            if self.admission is not None:
                await self.admission.charge(exchange.charged)

    def enter(self) -> None:
        if self.traffic.draining:
            raise stopping()
        if len(self.traffic.open) >= self.section.limits.max_in_flight:
            raise refusals.overloaded(self.section.limits.max_in_flight)
        self.exchange.task = asyncio.current_task()
        self.traffic.enter(self.exchange)

    async def refuse(self, error: ApiError) -> None:
        self.exchange.fail(error)
        await refuse(self.request, self.send, error, self.headers())

    async def stopped(self) -> None:
        """The client went away, or the server's time to drain is over."""
        if self.exchange.stopped_by == "client":
            self.exchange.gone()
        elif self.exchange.status != 200:
            await self.refuse(stopping())
        # otherwise the answer had begun, and closing the connection breaks it off

    async def admitted(self, admission: Admission) -> None:
        exchange, limits = self.exchange, admission.limits
        exchange.key_id, exchange.tenant = admission.key_id, admission.tenant
        exchange.key_class = admission.key_class
        body = await self.request.body(int(limits.max_body_mib * 2**20))
        told, path = self.traffic.table, self.request.path
        asked = caps.read(
            body, path, limits, self.section.allow, told.max_length, refuses=told.refuses
        )
        exchange.stream = asked.stream
        if self.section.log_prompts:
            exchange.asked, exchange.answer = asked.values, []
        if not admission.may(asked.model):
            raise refusals.not_for_you(asked.model)
        if limits.tokens_per_minute is not None:
            exchange.reserved = estimate_tokens(asked.values, limits.max_tokens)
            await admission.reserve(exchange.reserved)
        # Nothing is awaited between reading the table and `take`: who swaps it sees no request, or one that counts.
        table = self.traffic.table
        target = self.target(asked, table)
        self.traffic.take(exchange, target)
        try:
            await self.answer(admission, asked, table, target)
        finally:
            self.traffic.give_back(exchange)

    def target(self, asked: Asked, table: Table) -> Target:
        if not table.ready or table.upstream is None:
            raise not_ready(table)
        route = table.route(asked.model)
        if route is None:
            raise no_such_model(asked.model)
        self.exchange.model = route.name
        return choose(route, self.request.headers.get("x-toolkit-target"))

    async def answer(
        self, admission: Admission, asked: Asked, table: Table, target: Target
    ) -> None:
        url = f"{table.upstream}{self.request.path}"
        call = Call(url, target, asked, self.headers())
        cache, values = self.parts.cache, asked.values
        if cache is None or not is_deterministic(self.request.path, values, self.request.headers):
            await self.forward(call)
            return
        certificate = self.generation.certificate(table)
        key = key_of(admission, certificate, target, self.request.path, values)
        if (kept := await cache.get(key)) is not None:
            await self.answer_from_cache(kept, call)
            return
        self.exchange.cache = "miss"
        call.headers.append((HEADER.encode(), b"miss"))
        if (answer := await self.forward(call)) is not None:
            await cache.put(key, answer)

    async def answer_from_cache(self, kept: bytes, call: Call) -> None:
        self.exchange.cache, self.exchange.status = "hit", 200
        self.exchange.count(usage_of(kept))
        await respond(self.send, kept, headers=[JSON, *call.headers, (HEADER.encode(), b"hit")])

    async def forward(self, call: Call) -> bytes | None:
        """Ask the engine, and let go of it when the client goes away."""
        watch = asyncio.ensure_future(self.request.gone())
        watch.add_done_callback(self.client_left)
        try:
            return await forward(self.parts.upstream, call, self.exchange, self.send)
        finally:
            watch.remove_done_callback(self.client_left)
            watch.cancel()

    def client_left(self, watch: asyncio.Future[None]) -> None:
        if not watch.cancelled():
            self.exchange.stop("client")

    def headers(self) -> Headers:
        """Who answers, and where the key stands in its limits."""
        limits = self.admission.headers if self.admission else {}
        return [*self.exchange.headers(), *((k.encode(), v.encode()) for k, v in limits.items())]


def not_ready(table: Table) -> ApiError:
    """The supervisor has not said yes, or has taken it back."""
    return ApiError(
        503,
        f"The server is not ready: {table.reason or 'no engine is running'}.",
        code="not_ready",
        headers={"Retry-After": "2"},
    )
