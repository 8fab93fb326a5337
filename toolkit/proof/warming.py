"""Warm-up: every adapter once at each length bucket, so that no client pays for a first kernel, graph or copy."""

from __future__ import annotations

import time
from collections.abc import Iterator

from toolkit.proof import ProofTarget, ServedAdapter, WarmUp
from toolkit.proof.live import Live

SHORT, MIDDLE = 16, 512
NEW_TOKENS = 4
KEPT_FREE = 16
"""Tokens of the context that the longest prompt leaves: SGLang 0.5.17 keeps six for itself."""


def buckets(max_length: int) -> tuple[int, ...]:
    """Prompt lengths in tokens: short, middle, and nearly the context."""
    longest = max(max_length - KEPT_FREE, 1)
    return tuple(sorted({min(n, longest) for n in (SHORT, MIDDLE, longest)}))


def warm_up(target: ProofTarget, adapters: tuple[ServedAdapter, ...] | None = None) -> WarmUp:
    """Ask every adapter (and the base) at short, middle and long prompts.

    The long prompt is for the base alone, and not on a CPU: what it warms (attention kernels, chunks of prefill) does
    not depend on the adapter, and a CPU compiles nothing by length.

    Args:
        target: The engine.
        adapters: Instead of base and all adapters of ``target``: adapters that were just loaded.

    Raises:
        EngineError: The engine does not answer.
    """
    live = Live.of(target)
    token = _plain_token(live)
    seconds: dict[str, dict[int, float]] = {}
    for model_id, length in _asked(target, adapters):
        begin = time.monotonic()
        live.complete(model_id, [token] * length, NEW_TOKENS)
        seconds.setdefault(model_id, {})[length] = round(time.monotonic() - begin, 3)
    return WarmUp(seconds)


def _asked(
    target: ProofTarget, adapters: tuple[ServedAdapter, ...] | None
) -> Iterator[tuple[str, int]]:
    lengths = buckets(target.max_length)
    if target.device == "cpu":
        lengths = lengths[:1]
    if adapters is None:
        yield from ((target.model_id, length) for length in lengths)
    for adapter in target.adapters if adapters is None else adapters:
        yield from ((adapter.model_id, length) for length in lengths[:2])


def _plain_token(live: Live) -> int:
    """Any token of a chat; the last but a few is text or a line end."""
    ids = live.question_ids("Hello there, how are you?")
    return ids[len(ids) // 2]
