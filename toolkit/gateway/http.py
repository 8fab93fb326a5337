"""The little of HTTP that the front needs above uvicorn: bodies with limits, answers, errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from toolkit.gateway.openai import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

BODY_TIMEOUT_S = 60.0
"""Until a whole body must be there."""
LINGER_S = 2.0
"""For this long a refused body is still read and thrown away, so that its sender gets to read why."""
JSON = (b"content-type", b"application/json")


class ClientGoneError(Exception):
    """The client closed the connection before it sent everything."""


class Request:
    """One request; header names are lower case."""

    def __init__(
        self, scope: Scope, receive: Receive, *, body_timeout_s: float = BODY_TIMEOUT_S
    ) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        self.receive = receive
        self.body_is_read = False
        self._body_timeout_s = body_timeout_s

    async def body(self, max_bytes: int) -> bytes:
        """Read the body.

        Raises:
            ApiError: 413 as soon as it is known to be too large, 408 when it does not come.
            ClientGoneError: There is nobody to answer.
        """
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > max_bytes:
            raise _too_large(max_bytes)
        try:
            async with asyncio.timeout(self._body_timeout_s):
                return await self._read(max_bytes)
        except TimeoutError:
            raise ApiError(
                408,
                f"The body of your request did not arrive within {self._body_timeout_s:g} s.",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None

    async def _read(self, max_bytes: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while not self.body_is_read:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > max_bytes:
                raise _too_large(max_bytes)
            self.body_is_read = not message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def gone(self) -> None:
        """Return when the client has closed the connection (or the answer is complete)."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def throw_away(self) -> None:
        """Read what is left of the body for a moment."""
        try:
            async with asyncio.timeout(LINGER_S):
                while not self.body_is_read:
                    message = await self.receive()
                    self.body_is_read = not message.get("more_body", False)
        except TimeoutError:
            pass


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The body of your request is larger than this server's limit of {max_bytes / 2**20:g} MiB.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


async def respond(
    send: Send, body: bytes, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = (JSON,)
) -> None:
    """Send a whole answer."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def refuse(request: Request, send: Send, error: ApiError, headers: Headers) -> None:
    """Send an error; a sender in the middle of too large a body gets the time to read it."""
    body = error.body()
    lines = [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
    if error.status != 413 or request.body_is_read or "expect" in request.headers:
        await respond(send, body, error.status, [JSON, *headers, *lines])
        return
    length = (b"content-length", str(len(body)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [length, JSON, *headers, *lines],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await request.throw_away()
    await send({"type": "http.response.body", "body": b""})
