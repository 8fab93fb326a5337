"""uvicorn, made strict: headers have a size and a deadline, signals are ours, malformed HTTP is answered in JSON."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from toolkit.gateway.http import App
from toolkit.gateway.openai import ApiError

HEADER_TIMEOUT_S = 15.0
"""Until the headers of a request must be there."""
MAX_HEADER_BYTES = 64 * 1024
KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that it is they who close them."""
GRACE_S = 2
"""For the last bytes of answers when the server ends."""


class OneWrite:
    """A transport that sends a response's head together with what follows: one packet and one system call less.

    The application sends a body right after each head; an answer that ends without one is flushed.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.is_closing = transport.is_closing
        self.get_extra_info = transport.get_extra_info

    def write(self, data: bytes) -> None:
        """Send, or keep a head until the next write."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n") and data[9:12] != b"100":
            self._head = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Send what was kept: there is no body behind a head that answers ``HEAD``."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Send what was kept, and close."""
        self.flush()
        self._transport.close()


class StrictProtocol(HttpToolsProtocol):
    """One connection."""

    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request, not for ever."""
        self._out = OneWrite(transport)
        super().connection_made(self._out)  # type: ignore[arg-type]
        self._expect_headers()

    def on_message_begin(self) -> None:
        """A request begins; on a kept connection there was no deadline before."""
        self._header_bytes = 0
        if self._deadline is None:
            self._expect_headers()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; the parser calls it once it is complete."""
        self._count(
            len(name) + len(value) + 32
        )  # as if each took a little memory of its own, which it does
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The deadline is met."""
        self._met()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """An answer is over."""
        self._out.flush()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._met()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        body = ApiError(400, msg).body()
        self.transport.write(
            b"".join(
                (
                    STATUS_LINE[400],
                    b"content-type: application/json\r\ncontent-length: ",
                    str(len(body)).encode(),
                    b"\r\nconnection: close\r\n\r\n",
                    body,
                )
            )
        )
        self.transport.close()

    def _expect_headers(self) -> None:
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def _met(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ValueError("headers are too large")  # the parser makes a 400 of it


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to us."""

    def __init__(self, app: App) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=StrictProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield

    async def serve_on(self, listening: socket.socket) -> None:
        """Serve until ``should_exit``."""
        await self.serve(sockets=[listening])


def public_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        OSError: The address is taken or not ours.
    """
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(address)
    listening.listen(2048)
    listening.setblocking(False)
    return listening
