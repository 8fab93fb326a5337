"""How often a part may die, and how long it waits before it is started again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

LIMIT = 5
"""Restarts of one part in :data:`WINDOW_S`; one more, and the whole server ends."""
WINDOW_S = 600.0
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0


class Restarts:
    """The restarts of one part.

    Args:
        limit: Restarts allowed within the window.
        clock: Seconds that only grow.
    """

    def __init__(self, limit: int = LIMIT, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._recent: deque[float] = deque()
        self.total = 0

    def next_delay(self) -> float | None:
        """Seconds until the part may start again: 0, then 1, 2, 4...; ``None`` when the budget is spent."""
        now = self._clock()
        while self._recent and now - self._recent[0] > WINDOW_S:
            self._recent.popleft()
        if len(self._recent) >= self._limit:
            return None
        before = len(self._recent)
        self._recent.append(now)
        self.total += 1
        return 0.0 if not before else min(FIRST_DELAY_S * 2 ** (before - 1), LONGEST_DELAY_S)

    @property
    def spent(self) -> str:
        """The budget in words, for the error that ends a server."""
        return f"{self._limit} restarts in {WINDOW_S / 60:.0f} minutes"
