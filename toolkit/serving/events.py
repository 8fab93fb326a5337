"""What a supervisor tells: JSON lines for the command that started it, and for good in ``events.jsonl``.

Nothing that a server does waits for whoever reads: a command that was stopped (Ctrl-Z) reads nothing, and its pipe
holds 64 KiB. What it missed lies in the file; :func:`last` reads how that ends.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

EVENTS_FILE = "events.jsonl"
LARGEST_FILE = 4 * 2**20
"""Bytes of ``events.jsonl`` before it is begun anew; one older file is kept."""
WAITING = 500
"""Lines that wait for a reader; the oldest go first."""
FAREWELL_S = 2.0
"""What a reader gets for the last lines when the server is gone."""


class Events:
    """Writes events to a file and, while somebody reads them, to a pipe.

    Args:
        file: ``events.jsonl``.
        pipe: The pipe; losing it is no error.
    """

    def __init__(self, file: Path, pipe: IO[Any] | None = None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._reader = _Reader(os.dup(pipe.fileno())) if pipe else None

    def send(self, event: str, **values: Any) -> None:
        """Tell one thing."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n"
        with self._lock:
            self._keep(line)
            if self._reader:
                self._reader.put(line)

    def close(self) -> None:
        """Let the reader have the last lines, if it reads."""
        if self._reader:
            self._reader.close()

    def _keep(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop a server
            if self._file.exists() and self._file.stat().st_size > LARGEST_FILE:
                self._file.replace(self._file.with_suffix(".old.jsonl"))
            with self._file.open("a") as out:
                out.write(line)


class _Reader:
    """The other end of a pipe, written to by a thread of its own: it alone waits."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: collections.deque[str] = collections.deque(maxlen=WAITING)
        self._news = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._write, name="events", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Returns at once."""
        with self._news:
            self._lines.append(line)
            self._news.notify()

    def close(self) -> None:
        """Wait for the last lines, not for ever."""
        with self._news:
            self._over = True
            self._news.notify()
        self._thread.join(FAREWELL_S)

    def _next(self) -> bytes:
        """Empty when it is over."""
        with self._news:
            self._news.wait_for(lambda: self._lines or self._over)
            return self._lines.popleft().encode() if self._lines else b""

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # nobody reads any more
            while line := self._next():
                while line:
                    line = line[os.write(self._descriptor, line) :]
        os.close(self._descriptor)


def last(file: Path) -> Mapping[str, Any]:
    """The newest event of ``events.jsonl``; empty where there is none."""
    try:
        lines = file.read_text(errors="replace").splitlines()
        event = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
    return event if isinstance(event, dict) else {}
