"""One JSON line per request. Writing is a thread's work: a full disk costs lines, never traffic."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from toolkit.gateway.background import Background
from toolkit.gateway.exchange import Exchange

WAITING = 10_000
"""Lines that may wait for the disk; more are dropped and counted."""


class AccessLog(Background):
    """Appends to a file (which may be renamed away by log rotation), or to standard error."""

    def __init__(self, path: Path | None) -> None:
        super().__init__("access-log", WAITING)
        self._path = path
        self._file: IO[str] | None = None

    def handle(self, exchanges: list[Exchange]) -> int:
        """Write lines together."""
        try:
            out = self._open()
            out.write("".join(json.dumps(line(exchange)) + "\n" for exchange in exchanges))
            out.flush()
        except (OSError, ValueError):  # ValueError: standard error is closed
            self._file = None
            return len(exchanges)
        return 0

    def _open(self) -> IO[str]:
        if self._path is None:
            return sys.stderr
        if self._file is not None and not _is_at(self._file, self._path):
            self._file.close()
            self._file = None
        if self._file is None:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        return self._file


def _is_at(file: IO[str], path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def line(exchange: Exchange) -> dict[str, Any]:
    """What is written of a request: who, what, how long; texts only where the recipe says so."""
    target = exchange.target
    values: dict[str, Any] = {
        "time": datetime.fromtimestamp(exchange.time, UTC).isoformat(timespec="milliseconds"),
        "request_id": exchange.id,
        "key_id": exchange.key_id,
        "tenant": exchange.tenant,
        "path": exchange.path,
        "model": exchange.model,
        "target": target.label if target else None,
        "version": target.version if target else None,
        "run_id": target.run_id if target else None,
        "stream": exchange.stream,
        "status": exchange.status,
        "error": exchange.code,
        "cause": exchange.cause,
        "cache": exchange.cache,
        "prompt_tokens": exchange.prompt_tokens,
        "completion_tokens": exchange.completion_tokens,
        "tokens_estimated": exchange.estimated,
        "ttft_s": _since(exchange.begun_at, exchange.first_at),
        "engine_asked_s": _since(exchange.begun_at, exchange.sent_at),
        "duration_s": _since(exchange.begun_at, exchange.ended_at),
    }
    if exchange.asked is not None:
        values["request"] = exchange.asked
        values["answer"] = b"".join(exchange.answer or ()).decode(errors="replace")
    return values


def _since(begin: float, end: float | None) -> float | None:
    return None if end is None else round(end - begin, 6)
