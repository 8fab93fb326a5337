"""The public port: an allow-list of paths, and nothing else.

Bare ASGI: between uvicorn and the engine stands only what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST

from toolkit.gateway import refusals
from toolkit.gateway.access import Admission
from toolkit.gateway.callers import Callers
from toolkit.gateway.exchange import Exchange, header_value, request_id
from toolkit.gateway.generation import Generation, Parts, not_ready
from toolkit.gateway.http import (
    BODY_TIMEOUT_S,
    JSON,
    Receive,
    Request,
    Scope,
    Send,
    refuse,
    respond,
)
from toolkit.gateway.openai import ApiError, model_list, one_model
from toolkit.gateway.openapi import document
from toolkit.gateway.proxy import stopping
from toolkit.gateway.requests import BODIES
from toolkit.gateway.settings import GatewaySettings

Answer = Callable[[], Awaitable[bytes]]
TEXT = (b"content-type", header_value(CONTENT_TYPE_LATEST))
OPEN = ("/healthz", "/readyz", "/openapi.json")
"""Paths that everyone may ask: they say nothing of what is served."""
GUARDED = ("/v1/models", "/metrics", "/toolkit/certificate")
"""Paths that need what generation needs."""
MODEL = "/v1/models/"
"""And what begins so: the name of one model follows."""


class Front:
    """The ASGI application.

    Args:
        settings: What the server was started with.
        parts: What it is made of.
        body_timeout_s: Seconds until a request's body must be there.
    """

    def __init__(
        self, settings: GatewaySettings, parts: Parts, *, body_timeout_s: float = BODY_TIMEOUT_S
    ) -> None:
        self._parts = parts
        self._body_timeout_s = body_timeout_s
        self._document = json.dumps(document(settings.front)).encode()
        self._generate = Generation(settings.front, parts)
        self._callers = Callers(settings.front)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive, body_timeout_s=self._body_timeout_s)
        exchange = Exchange(request.path, request_id(request.headers.get("x-request-id")))
        try:
            if request.path not in OPEN:
                self._callers.check(request.headers)
            if request.path in BODIES:
                _expect(request, "POST")
                await self._generate(request, exchange, send)
            else:
                await self._read(request, exchange, send)
        except ApiError as error:
            exchange.fail(error)
            await refuse(request, send, error, exchange.headers())
            if request.path not in OPEN:  # probes come every second
                self._parts.finish(exchange)

    async def _read(self, request: Request, exchange: Exchange, send: Send) -> None:
        """What the front says of itself."""
        path = request.path
        guarded = path in GUARDED or (path.startswith(MODEL) and path != MODEL)
        if path not in OPEN and not guarded:
            raise ApiError(404, f"Invalid URL ({request.method} {path})", code="unknown_url")
        _expect(request, "GET")
        headers = [JSON, *exchange.headers()]
        if guarded:
            admission = await self._parts.access.admit(request.headers, None)
            await admission.charge(0)
            body = self._guarded(path, admission)
            if path == "/metrics":
                headers[0] = TEXT
        else:
            body = self._open(path)
        await respond(send, body, headers=headers)

    def _open(self, path: str) -> bytes:
        traffic = self._parts.traffic
        if path == "/openapi.json":
            return self._document
        if path == "/readyz" and traffic.draining:
            raise stopping()
        if path == "/readyz" and not traffic.table.ready:
            raise not_ready(traffic.table)
        return _json({"status": "ready" if path == "/readyz" else "ok"})

    def _guarded(self, path: str, admission: Admission) -> bytes:
        traffic = self._parts.traffic
        if path == "/v1/models":
            return model_list(traffic.table, traffic.started, admission.may)
        if path.startswith(MODEL):
            name = path.removeprefix(MODEL)
            return one_model(name, traffic.table, traffic.started, admission.may)
        if path == "/metrics":
            if not admission.may(path):
                raise refusals.no_metrics()
            return self._parts.metrics.text()
        if not traffic.table.certificate:
            raise ApiError(404, "There is no certificate yet.", code="not_found")
        return _json(traffic.table.certificate)


def _expect(request: Request, method: str) -> None:
    if request.method != method:
        raise ApiError(
            405,
            f"Not allowed to {request.method} on {request.path} (HINT: Perhaps you meant to make a {method} request.)",
            code="method_not_allowed",
            headers={"Allow": method},
        )


def _json(values: Any) -> bytes:
    return json.dumps(values).encode()
