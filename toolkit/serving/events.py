"""What a supervisor tells: JSON lines for the command that started it, and for good in ``events.jsonl``."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import IO, Any

LARGEST_FILE = 4 * 2**20
"""Bytes of ``events.jsonl`` before it is begun anew; one older file is kept."""


class Events:
    """Writes events to a file and, while somebody reads them, to a pipe.

    Args:
        file: ``events.jsonl``.
        pipe: The pipe; losing it is no error.
    """

    def __init__(self, file: Path, pipe: IO[str] | None = None) -> None:
        self._file = file
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, event: str, **values: Any) -> None:
        """Tell one thing."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n"
        with self._lock:
            self._keep(line)
            if self._pipe is not None:
                try:
                    self._pipe.write(line)
                    self._pipe.flush()
                except (BrokenPipeError, ValueError):
                    self._lose()

    def _lose(self) -> None:
        """Nobody reads any more; closed now, for at its end Python would stumble over what is left in the buffer."""
        pipe, self._pipe = self._pipe, None
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()

    def _keep(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop a server
            if self._file.exists() and self._file.stat().st_size > LARGEST_FILE:
                self._file.replace(self._file.with_suffix(".old.jsonl"))
            with self._file.open("a") as out:
                out.write(line)
