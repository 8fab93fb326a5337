"""One request and what became of it: what the access log, the metrics and the traces are written from."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from toolkit.gateway.openai import ApiError
from toolkit.gateway.table import Target

CLIENT_GONE = 499
"""Status in logs and metrics of a request whose client went away (nginx's number for it)."""
ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")


@dataclass(eq=False, slots=True)
class Exchange:
    """Filled in while the request goes through. Times ending in ``_at`` are of ``time.perf_counter``, seconds."""

    path: str
    id: str
    begun_at: float = field(default_factory=time.perf_counter)
    time: float = field(default_factory=time.time)
    key_id: str = "-"
    tenant: str = "-"
    key_class: str = "none"
    model: str = "-"
    target: Target | None = None
    stream: bool = False
    status: int = 500
    code: str | None = None
    """Why it failed: the ``code`` of the error, or its type."""
    cause: str | None = None
    """What the engine or the connection to it said; for the log only."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    """The engine did not say how many tokens: the stream was broken off."""
    reserved: int = 0
    """What its key was charged in advance."""
    cache: str | None = None
    """``hit`` or ``miss``, where the answer may be kept."""
    sent_at: float | None = None
    """Asked the engine."""
    headers_at: float | None = None
    """The engine began to answer."""
    first_at: float | None = None
    """The first token was there (of a stream)."""
    ended_at: float = 0.0
    task: asyncio.Task[Any] | None = None
    stopped_by: Literal["client", "server"] | None = None
    asked: Mapping[str, Any] | None = None
    """The request's JSON, where prompts are logged."""
    answer: list[bytes] | None = None
    """What the client got, where prompts are logged."""

    @property
    def charged(self) -> int:
        """Tokens that the key pays: what the engine counted, or the estimate where the client left before it did."""
        if self.cache == "hit":
            return 0
        counted = self.prompt_tokens + self.completion_tokens
        unknown = self.estimated or (self.stopped_by == "client" and self.sent_at is not None)
        return max(counted, self.reserved) if unknown else counted

    @property
    def seconds_per_token(self) -> float | None:
        """Time per output token after the first; ``None`` for fewer than two tokens."""
        if self.first_at is None or self.completion_tokens < 2:
            return None
        return (self.ended_at - self.first_at) / (self.completion_tokens - 1)

    def count(self, usage: Mapping[str, Any]) -> None:
        """Take the engine's ``usage``."""
        self.prompt_tokens = _whole(usage.get("prompt_tokens"))
        self.completion_tokens = _whole(usage.get("completion_tokens"))

    def fail(self, error: ApiError) -> None:
        """It is answered with an error."""
        self.status = error.status
        self.code = error.code or error.type
        if self.cause is None and error.__cause__ is not None:
            self.cause = repr(error.__cause__)

    def gone(self) -> None:
        """There is no client any more."""
        self.status, self.code = CLIENT_GONE, "client_gone"

    def stop(self, by: Literal["client", "server"]) -> None:
        """End it early: the upstream is let go, and the client is told if it is there."""
        if self.stopped_by is None and self.task is not None:
            self.stopped_by = by
            self.task.cancel()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Who answered, for the response."""
        found = [(b"x-request-id", self.id.encode())]
        if self.target is not None:
            found.append((b"x-toolkit-model-version", header_value(self.target.version)))
            found.append((b"x-toolkit-target", header_value(self.target.label)))
            if self.target.run_id:
                found.append((b"x-toolkit-run-id", header_value(self.target.run_id)))
        return found


def request_id(offered: str | None) -> str:
    """The client's id if it is short and plain, a new one otherwise."""
    if offered and len(offered) <= 128 and ID_CHARACTERS.issuperset(offered):
        return offered
    return f"req-{random.getrandbits(128):032x}"


def header_value(text: str) -> bytes:
    """A text that is safe in a header."""
    return "".join(c if " " <= c <= "~" else "?" for c in text).encode()


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
