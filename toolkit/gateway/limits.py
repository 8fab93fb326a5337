"""How much one key may ask: requests and tokens per minute, as leaky buckets on the monotonic clock (GCRA).

A bucket holds one minute's worth, so an idle key may spend a whole minute's limit at once; from then on it refills
steadily. Over any ``t`` seconds a key gets at most ``limit * (1 + t / 60)``. Of each bucket one number is kept: when it
will be full again. A bucket that is full is forgotten, so memory follows the keys of the last minute, not all keys.

Tokens are taken by estimate when the prompt is known and settled when the engine has counted them. What was
underestimated becomes a debt that the next requests wait for.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.gateway import refusals

PERIOD_S = 60.0
ROUNDING_S = 1e-6
SWEPT_PER_CALL = 2
"""Other buckets looked at on each request, and forgotten if they are full."""
BYTES_PER_TOKEN = 4
UNSTATED_ANSWER_TOKENS = 256
"""What a request without ``max_tokens`` is taken for until its usage is known."""

Kind = Literal["requests", "tokens"]


@dataclass(frozen=True)
class Standing:
    """A bucket after something was taken."""

    kind: Kind
    limit: int
    remaining: int
    reset_s: float
    """Seconds until it is full again."""

    def headers(self) -> dict[str, str]:
        """As OpenAI sends them."""
        return {
            f"x-ratelimit-limit-{self.kind}": str(self.limit),
            f"x-ratelimit-remaining-{self.kind}": str(self.remaining),
            f"x-ratelimit-reset-{self.kind}": refusals.duration(self.reset_s),
        }


class Meters:
    """The buckets of all keys of this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: OrderedDict[tuple[str, Kind], float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, who: str, kind: Kind, limit: int, amount: int) -> Standing:
        """Take ``amount`` out of the bucket of ``who``, which holds ``limit`` per minute.

        Raises:
            toolkit.gateway.openai.ApiError: 429; nothing was taken.
        """
        now = self._clock()
        self._sweep(now)
        full_at = max(self._full_at.get((who, kind), now), now)
        after = full_at + amount * PERIOD_S / limit
        if amount > limit:
            raise refusals.too_large(who, limit, amount)
        wait_s = after - now - PERIOD_S
        if wait_s > ROUNDING_S:
            error = refusals.too_fast(kind, who, limit, amount, wait_s)
            error.headers.update(_standing(kind, limit, full_at - now).headers())
            raise error
        self._keep(who, kind, after)
        return _standing(kind, limit, after - now)

    def settle(self, who: str, kind: Kind, limit: int, difference: int) -> None:
        """Take ``difference`` more without asking (a debt), or give back where it is negative."""
        now = self._clock()
        full_at = max(self._full_at.get((who, kind), now), now)
        self._keep(who, kind, full_at + difference * PERIOD_S / limit)

    def standing(self, who: str, kind: Kind, limit: int) -> Standing:
        """The bucket as it is."""
        now = self._clock()
        return _standing(kind, limit, max(0.0, self._full_at.get((who, kind), now) - now))

    def _keep(self, who: str, kind: Kind, full_at: float) -> None:
        self._full_at[who, kind] = full_at
        self._full_at.move_to_end((who, kind))

    def _sweep(self, now: float) -> None:
        """Look at the buckets that were touched longest ago; one in debt goes to the back of the queue."""
        for _ in range(min(SWEPT_PER_CALL, len(self._full_at))):
            bucket, full_at = self._full_at.popitem(last=False)
            if full_at > now:
                self._full_at[bucket] = full_at


def _standing(kind: Kind, limit: int, reset_s: float) -> Standing:
    left = (PERIOD_S - reset_s + ROUNDING_S) * limit / PERIOD_S
    return Standing(kind, limit, max(0, math.floor(left)), reset_s)


def estimate_tokens(body: Mapping[str, Any], default_max_tokens: int | None = None) -> int:
    """Tokens that a request may take: its texts at four bytes a token, and what it asks for, ``n`` times.

    Media are not texts: ``data:`` URLs count nothing here and are settled with the engine's usage.
    """
    prompt = sum(_weight(body.get(part)) for part in ("messages", "prompt", "input", "tools"))
    asked = body.get("max_completion_tokens") or body.get("max_tokens") or default_max_tokens
    if "input" in body and "messages" not in body:  # embeddings have no answer
        asked = 0
    elif not isinstance(asked, int):
        asked = UNSTATED_ANSWER_TOKENS
    n = body.get("n")
    return math.ceil(prompt) + max(0, asked) * (n if isinstance(n, int) and n > 0 else 1)


def _weight(part: Any) -> float:
    """Tokens of all texts in a JSON value; a list of token ids counts each."""
    if isinstance(part, str):
        return 0 if part.startswith("data:") else len(part.encode()) / BYTES_PER_TOKEN
    if isinstance(part, Mapping):
        return sum(_weight(value) for value in part.values())
    if isinstance(part, list):
        return sum(1 if isinstance(value, int) else _weight(value) for value in part)
    return 0
