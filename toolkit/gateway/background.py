"""Work on finished requests that traffic never waits for: a bounded queue, and a thread that looks at it."""

from __future__ import annotations

import threading
from collections import deque

from toolkit.gateway.exchange import Exchange

LOOK_S = 0.1
"""The thread looks this often; waking it for each request would cost as much as a tenth of the request."""
TOGETHER = 500
"""Requests handled at once."""


class Background:
    """Hands finished requests to :meth:`handle` in a thread.

    Attributes:
        dropped: Requests that were lost: too many waited, or :meth:`handle` said so.
    """

    def __init__(self, name: str, waiting: int) -> None:
        self.dropped = 0
        self._limit = waiting
        self._waiting: deque[Exchange] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, exchange: Exchange) -> None:
        """Take a request that is over; never waits, never raises."""
        if len(self._waiting) < self._limit:
            self._waiting.append(exchange)
        else:
            self.dropped += 1

    def close(self, timeout_s: float = 2.0) -> None:
        """Handle what is left, if it can be done so fast."""
        self._closing.set()
        self._thread.join(timeout_s)

    def handle(self, exchanges: list[Exchange]) -> int:
        """Do the work, raise nothing, and return how many were lost."""
        raise NotImplementedError

    def _work(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(LOOK_S)
            while self._waiting:
                number = min(len(self._waiting), TOGETHER)
                self.dropped += self.handle([self._waiting.popleft() for _ in range(number)])
