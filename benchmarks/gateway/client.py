"""A client as cheap as can be: it sends, notes when bytes come, and counts events; it parses nothing."""

import asyncio
import json
import time
from dataclasses import dataclass, field


def ask(port: int, *, tokens: int, stream: bool, words: int = 100, model: str = "bench") -> bytes:
    """The bytes of a request like the openai client's."""
    messages = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "word " * words},
    ]
    body = json.dumps(
        {
            "model": model,
            "messages": messages,
            "max_tokens": tokens,
            "stream": stream,
            "temperature": 0,
        }
    )
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer none\r\n"
        "Accept: application/json\r\nUser-Agent: OpenAI/Python 3\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


@dataclass
class Answer:
    """Times in seconds from the request's first byte."""

    first: float = 0.0
    last: float = 0.0
    events: int = 0
    ok: bool = False
    gaps: list[float] = field(default_factory=list)


class Caller(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.done: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready."""
        self.transport = transport

    def call(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a request; the future holds what came."""
        self.answer, self.tail = Answer(), b""
        self.done = asyncio.get_running_loop().create_future()
        self.body_left = None
        self.begun = self.seen = time.perf_counter()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        """Note when it came, and whether it was the last."""
        now, answer = time.perf_counter(), self.answer
        if not answer.events and not answer.first:
            self.head(data, now)
        answer.events += data.count(b"data: {")
        answer.gaps.append(now - self.seen)
        self.seen = now
        if self.body_left is not None:
            self.body_left -= len(data)
            self.finish(now, over=self.body_left <= 0)
            return
        self.tail = (self.tail + data)[-64:]
        self.finish(now, over=self.tail.endswith(b"0\r\n\r\n"))

    def head(self, data: bytes, now: float) -> None:
        """Read the response's head."""
        self.answer.first = now - self.begun
        self.answer.ok = data.startswith(b"HTTP/1.1 200")
        lines, found, _ = data.partition(b"\r\n\r\n")
        if found and b"content-length: " in lines:
            length = int(lines.partition(b"content-length: ")[2].split(b"\r\n")[0])
            self.body_left = length + len(lines) + 4

    def finish(self, now: float, *, over: bool) -> None:
        """Hand over the answer if it is over."""
        if over and not self.done.done():
            self.answer.last = now - self.begun
            self.answer.ok = self.answer.ok and (
                self.body_left is not None or b"[DONE]" in self.tail
            )
            self.done.set_result(self.answer)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio gives it
        """Broken off."""
        if self.done is not None and not self.done.done():
            self.answer.ok = False
            self.done.set_result(self.answer)


async def connect(port: int) -> Caller:
    """A new connection."""
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(Caller, "127.0.0.1", port)
    return caller
