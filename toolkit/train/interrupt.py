"""SIGTERM: finish the step, keep a checkpoint, then stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self


class StopOnTerm:
    """While entered, SIGTERM only sets :attr:`requested`; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True
