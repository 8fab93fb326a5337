"""The supervisor's side door: a Unix socket in a folder that only the owner may enter."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from toolkit.gateway.http import Receive, Request, Scope, Send, refuse, respond
from toolkit.gateway.openai import ApiError
from toolkit.gateway.table import Table
from toolkit.gateway.traffic import Traffic

MAX_BODY = 64 * 2**20


class Control:
    """The second ASGI application: ``PUT /table``, ``GET /status``, ``POST /drain``."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the supervisor."""
        request = Request(scope, receive)
        try:
            await respond(send, json.dumps(await self._answer(request)).encode())
        except ApiError as error:
            await refuse(request, send, error, [])

    async def _answer(self, request: Request) -> dict[str, Any]:
        asked = (request.method, request.path)
        if asked == ("PUT", "/table"):
            self._traffic.serve(_table(await request.body(MAX_BODY)))
        elif asked == ("POST", "/drain"):
            self._traffic.drain(_deadline(await request.body(MAX_BODY)))
        elif asked != ("GET", "/status"):
            raise ApiError(404, f"no {request.method} {request.path} here", code="not_found")
        return self._status()

    def _status(self) -> dict[str, Any]:
        traffic = self._traffic
        return {
            "in_flight": dict(traffic.in_flight),
            "open": len(traffic.open),
            "requests": traffic.requests,
            "started": traffic.started,
            "ready": traffic.table.ready and not traffic.draining,
            "draining": traffic.draining,
        }


def _table(body: bytes) -> Table:
    try:
        return Table.from_json(body)
    except (ValueError, TypeError, KeyError) as error:
        raise ApiError(400, f"not a table: {error!r}") from error


def _deadline(body: bytes) -> float:
    try:
        return float(json.loads(body)["deadline_s"])
    except (ValueError, TypeError, KeyError) as error:
        raise ApiError(400, f"not a deadline: {error!r}") from error


def private_socket(path: Path) -> socket.socket:
    """A listening Unix socket for its owner alone; what an earlier front left at ``path`` is replaced.

    Raises:
        OSError: The folder is not there, or the path is too long (108 bytes).
    """
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen(16)
    listening.setblocking(False)
    return listening
