"""Which phase of start-up an engine is in, read from its growing log."""

from __future__ import annotations

import time
from pathlib import Path

FIRST_PHASE = "importing"


class PhaseReader:
    """Follows an engine's log and knows which phase of start-up it is in.

    Args:
        table: (phase, text that begins it), in the order in which they come.
        log: The growing file.
    """

    def __init__(self, table: tuple[tuple[str, str], ...], log: Path) -> None:
        self._table = table
        self.log = log
        self._read = 0
        self._rest = b""
        self._start = time.monotonic()
        self._began = {FIRST_PHASE: 0.0}

    @property
    def current(self) -> str:
        """The phase that began last."""
        return next(reversed(self._began))

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self) -> None:
        """Read what the engine has printed since."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            for phase, text in self._table:
                if phase not in self._began and text.encode() in line:
                    self._began[phase] = self.total

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each phase that was seen, up to now."""
        begins = [*self._began.values(), self.total]
        return {
            phase: round(after - before, 2)
            for phase, before, after in zip(self._began, begins, begins[1:], strict=False)
        }
