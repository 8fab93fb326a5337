"""A fake engine as cheap as can be: one asyncio protocol, events like vLLM's, one every ``interval`` seconds.

``python -m benchmarks.gateway.engine INTERVAL_S`` prints its port. ``max_tokens`` of a request is the number of events.
"""

import asyncio
import json
import sys
from typing import Any

import uvloop

STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    """One piece in chunked encoding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(model: str, **values: Any) -> bytes:
    """One event of a stream."""
    head = {"id": f"chatcmpl-{1:032x}", "object": "chat.completion.chunk", "created": 1795310000}
    return chunk(
        f"data: {json.dumps(head | {'model': model} | values, separators=(',', ':'))}\n\n".encode()
    )


class Engine(asyncio.Protocol):
    """One connection; one request at a time."""

    interval_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
        self.transport, self.data, self.timer = transport, b"", None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio gives it
        """A client left."""
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Wait for a whole request."""
        self.data += data
        head, found, rest = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        if len(rest) >= length:
            self.data = rest[length:]
            self.answer(json.loads(rest[:length]))

    def answer(self, asked: dict[str, Any]) -> None:
        """Answer it whole, or begin a stream."""
        model, count = asked["model"], asked["max_tokens"]
        self.usage = {"prompt_tokens": 100, "completion_tokens": count, "total_tokens": 100 + count}
        if not asked.get("stream"):
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * count},
                "finish_reason": "stop",
            }
            body = {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": model,
                "choices": [choice],
            }
            data = json.dumps(body | {"usage": self.usage}).encode()
            head = (
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(data)
            )
            self.transport.write(head + data)
            return
        self.counted = (asked.get("stream_options") or {}).get("include_usage")
        choice = {
            "index": 0,
            "delta": {"content": " word"},
            "logprobs": None,
            "finish_reason": None,
        }
        self.word = event(model, choices=[choice])
        self.last = event(model, choices=[], usage=self.usage) if self.counted else b""
        self.left = count
        self.transport.write(STREAM)
        self.tick()

    def tick(self) -> None:
        """Send the next token."""
        self.left -= 1
        if self.left < 0:
            self.timer = None
            self.transport.write(self.last + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            return
        self.transport.write(self.word)
        loop = asyncio.get_running_loop()
        if self.interval_s:
            self.timer = loop.call_later(self.interval_s, self.tick)
        else:
            loop.call_soon(self.tick)


async def main() -> None:
    """Listen until killed."""
    Engine.interval_s = float(sys.argv[1])
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
