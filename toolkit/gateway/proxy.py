"""A request on its way to the engine and the answer on its way back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import aiohttp
from pydantic_core import from_json

from toolkit.gateway.caps import Asked
from toolkit.gateway.exchange import Exchange
from toolkit.gateway.http import JSON, Headers, Send, respond
from toolkit.gateway.openai import ApiError, engine_error
from toolkit.gateway.sse import EventStream, rename, usage_of
from toolkit.gateway.table import Target
from toolkit.gateway.upstream import Upstream, broken

BROKEN = (aiohttp.ClientError, TimeoutError, ConnectionError)
"""How a connection to the engine ends too early."""
END_S = 1.0
"""From the last event to the end of the engine's answer."""
STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True)
class Call:
    """All that a request to the engine needs.

    Attributes:
        url: Where the engine answers this path.
        target: Who answers.
        asked: What is asked.
        headers: For the client's response.
    """

    url: str
    target: Target
    asked: Asked
    headers: Headers


async def forward(upstream: Upstream, call: Call, exchange: Exchange, send: Send) -> bytes | None:
    """Ask the engine and answer the client; return the whole answer, ``None`` for a stream.

    Raises:
        ApiError: Nothing was sent to the client yet, and this is what it should get.
    """
    body = call.asked.body_for(call.target.model_id)
    exchange.sent_at = time.perf_counter()
    response = await upstream.post(call.url, body, exchange.id)
    try:
        exchange.headers_at = time.perf_counter()
        if response.status == 200 and response.content_type == "text/event-stream":
            await _Stream(call, exchange, send).run(response)
            return None
        return await _whole(call, exchange, response, send)
    except asyncio.CancelledError:
        response.close()  # the engine sees it and stops generating
        raise
    finally:
        response.release()


async def _whole(
    call: Call, exchange: Exchange, response: aiohttp.ClientResponse, send: Send
) -> bytes:
    try:
        body = await response.read()
    except BROKEN as error:
        raise broken(error) from error
    if response.status != 200:
        raise _refused(call, exchange, response.status, body)
    body = rename(body, call.target.model_id, call.asked.model)
    exchange.count(usage_of(body))
    exchange.status = 200
    if exchange.answer is not None:
        exchange.answer.append(body)
    await respond(send, body, headers=[JSON, *call.headers])
    return body


def _refused(call: Call, exchange: Exchange, status: int, body: bytes) -> ApiError:
    # A refusal may quote the prompt, and the log has none; a failure is the operator's to read.
    said = body[:500].decode(errors="replace") if status >= 500 else ""
    exchange.cause = f"engine: {status} {said}".rstrip()
    try:
        values = from_json(body)
    except ValueError:
        values = {}
    if status == 404 and call.url.endswith("/embeddings"):
        return ApiError(
            400, f"The model `{call.asked.model}` makes no embeddings.", code="unsupported_endpoint"
        )
    return engine_error(values, call.target.model_id, call.asked.model, status)


class _Stream:
    """Passes events on as they come. The response begins with the first: until then an error can have a status."""

    def __init__(self, call: Call, exchange: Exchange, send: Send) -> None:
        self._exchange = exchange
        self._send = send
        self._headers = call.headers
        self._begun = False
        self._ended = False
        self._events = EventStream(
            call.target.model_id, call.asked.model, hides_usage=call.asked.hides_usage
        )

    async def run(self, response: aiohttp.ClientResponse) -> None:
        try:
            await self._pass(response)
            if not self._events.done and self._events.error is None:
                raise broken_off()
        except BROKEN as error:
            response.close()
            self._exchange.cause = repr(error)
            await self._break_off(broken_off())
        except ApiError as error:
            response.close()
            await self._break_off(error)
        except asyncio.CancelledError:
            if self._exchange.stopped_by == "server":
                await self._break_off(stopping())
            else:
                raise
        finally:
            self._count()
        if not self._ended:
            await self._send({"type": "http.response.body", "body": b""})

    async def _pass(self, response: aiohttp.ClientResponse) -> None:
        feed, send, exchange = self._events.feed, self._send, self._exchange
        read = response.content.readany
        while piece := await read():
            events = feed(piece)
            if not events:
                continue
            if not self._begun:
                await self._begin()
            if exchange.answer is not None:
                exchange.answer.append(events)
            if self._events.done and self._events.error is None:
                await self._end(events, response)
                return
            await send({"type": "http.response.body", "body": events, "more_body": True})

    async def _end(self, events: bytes, response: aiohttp.ClientResponse) -> None:
        """Send the last events and end; the engine ends its answer a little later, and the connection is used again.

        Clients close at the last event, so nothing that happens after it may count against the answer.
        """
        self._ended = True
        self._exchange.task = None  # nobody stops it from here on
        await self._send({"type": "http.response.body", "body": events})
        self._exchange.ended_at = time.perf_counter()
        if response.content.is_eof():
            return
        try:
            async with asyncio.timeout(END_S):
                await response.read()
        except BROKEN:
            response.close()

    async def _begin(self) -> None:
        if self._events.failed_at_once and self._events.error is not None:
            raise self._events.error  # nothing was said before: an answer like any other
        self._begun = True
        self._exchange.first_at = time.perf_counter()
        self._exchange.status = 200
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [*STREAM_HEADERS, *self._headers],
            }
        )

    async def _break_off(self, error: ApiError) -> None:
        """Say that the answer is not complete; never just stop."""
        if not self._begun:
            raise error
        self._exchange.code = error.code
        await self._send({"type": "http.response.body", "body": error.event(), "more_body": True})

    def _count(self) -> None:
        exchange, events = self._exchange, self._events
        if events.error is not None:
            exchange.code = events.error.code or events.error.type
        if events.usage is not None:
            exchange.count(events.usage)
        elif events.events:
            exchange.completion_tokens = events.events
            exchange.estimated = True


def broken_off() -> ApiError:
    """The engine's stream ended before its last event."""
    return ApiError(502, "The engine broke off in the middle of its answer.", code="stream_broken")


def stopping() -> ApiError:
    """The server ends, and this request with it."""
    return ApiError(
        503,
        "The server is stopping; send the request again.",
        code="server_stopping",
        headers={"Retry-After": "1", "Connection": "close"},
    )
