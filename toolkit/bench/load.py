"""The load generator: N clients, each with one request in flight at a time, over streaming chat completions.

A client is a thread that waits on a socket: at the concurrencies of one machine (up to some hundred) that costs nothing
beside a token's time. Times are taken when a line arrives, before it is parsed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from toolkit.engines.client import Client, Message
from toolkit.errors import EngineError

Conversation = Sequence[Message]


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        start: Seconds since the level began.
        ttft: Time to first token: until the first event that carries text.
        e2e: Until the last event.
        gaps: Seconds between events that carry text; an event may hold several tokens.
        completion_tokens: From the endpoint's ``usage``, never counted by events.
        error: What went wrong; the other numbers are then meaningless.
    """

    start: float
    ttft: float
    e2e: float
    gaps: tuple[float, ...]
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: ``(e2e - ttft) / (tokens - 1)``; ``None`` for a single token."""
        return (
            (self.e2e - self.ttft) / (self.completion_tokens - 1)
            if self.completion_tokens > 1
            else None
        )


@dataclass(frozen=True)
class Level:
    """Everything measured at one concurrency; ``seconds`` is wall time from the first request to the last answer."""

    concurrency: int
    seconds: float
    samples: tuple[Sample, ...]


def measure(
    client: Client,
    model: str,
    conversations: Iterable[Conversation],
    *,
    concurrency: int,
    options: Mapping[str, Any],
    on_done: Callable[[Sample], None] = lambda _: None,
) -> Level:
    """Send every conversation, ``concurrency`` at a time, and time the answers.

    A request that fails is counted, not raised.
    """
    begin = time.monotonic()
    samples = []
    with ThreadPoolExecutor(concurrency) as pool:
        asked = [pool.submit(_one, client, model, c, options, begin) for c in conversations]
        try:
            for future in as_completed(asked):
                samples.append(future.result())
                on_done(samples[-1])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Level(concurrency, time.monotonic() - begin, tuple(samples))


def _one(
    client: Client, model: str, messages: Conversation, options: Mapping[str, Any], begin: float
) -> Sample:
    start = time.monotonic()
    arrivals: list[float] = []
    usage: Mapping[str, int] | None = None
    error = None
    try:
        for delta in client.stream(model, messages, **options):
            if delta.text:
                arrivals.append(time.monotonic())
            usage = delta.usage or usage
        error = _doubt(arrivals, usage)
    except EngineError as problem:
        error = problem.message
    end = time.monotonic()
    first = arrivals[0] if arrivals else end
    return Sample(
        start=start - begin,
        ttft=first - start,
        e2e=end - start,
        gaps=tuple(b - a for a, b in itertools.pairwise(arrivals)),
        prompt_tokens=(usage or {}).get("prompt_tokens", 0),
        completion_tokens=(usage or {}).get("completion_tokens", 0),
        error=error,
    )


def _doubt(arrivals: Sequence[float], usage: Mapping[str, int] | None) -> str | None:
    if usage is None:
        return "the endpoint sent no usage (stream_options.include_usage): tokens cannot be counted"
    return None if arrivals else "the answer had no text"
