"""HTTP on a Unix socket: how ``toolkit serve`` and ``toolkit adapters`` reach a supervisor, and it the front."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import logging
import os
import shutil
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from toolkit.errors import EngineError, ToolkitError, UsageError

logger = logging.getLogger(__name__)

LONGEST_PATH = 100
"""Bytes of a socket's path; the kernel takes 107."""

Handle = Callable[[str, str, Mapping[str, Any]], tuple[int, Mapping[str, Any]]]
"""Method, path, JSON body -> status, JSON answer. A ToolkitError becomes 409 with message and hint."""


def socket_folder() -> Path:
    """A new folder for sockets, for its owner alone, with a path short enough for the kernel."""
    folder = Path(tempfile.mkdtemp(prefix="toolkit-"))
    if len(os.fsencode(folder)) > LONGEST_PATH - 16:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="toolkit-", dir="/tmp"))
    return folder


def forget_sockets(control: Path) -> None:
    """Remove the folder of a control socket that nobody serves any more."""
    if control.parent.name.startswith("toolkit-"):
        shutil.rmtree(control.parent, ignore_errors=True)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("toolkit", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(
    control: Path,
    method: str,
    path: str,
    body: Mapping[str, Any] | str | None = None,
    *,
    timeout_s: float = 10.0,
) -> dict[str, Any]:
    """Ask once; ``body`` is JSON, or a text that is JSON already.

    Raises:
        EngineError: Nobody answers, or the answer is an error: its message and hint.
    """
    connection = UnixConnection(control, timeout_s)
    text = body if isinstance(body, str) or body is None else json.dumps(body)
    try:
        connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise EngineError(
            f"the server does not answer on {control}: {error}",
            "toolkit serve --status says what runs",
        ) from None
    finally:
        connection.close()
    values = _json(content)
    if answer.status >= 400:
        problem = values.get("error", values)
        told = problem if isinstance(problem, Mapping) else {"message": problem}
        raise EngineError(
            str(told.get("message") or f"{path} answered {answer.status}"), told.get("hint")
        )
    return values


def _json(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content or b"{}")
    except ValueError:
        return {"message": content.decode(errors="replace")}
    return values if isinstance(values, dict) else {"value": values}


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content or b"{}")
    except ValueError as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise UsageError("the body is not a JSON object")
    return body


class ControlServer:
    """Answers on a Unix socket in threads of its own; only its owner can open it."""

    def __init__(self, path: Path, handle: Handle) -> None:
        self.path = path
        previous = os.umask(0o077)
        try:
            self._server = _Server(str(path), handle)
        finally:
            os.umask(previous)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="control", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End, and remove the socket."""
        self._server.shutdown()
        self._server.server_close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, path: str, handle: Handle) -> None:
        self.handle_json = handle
        super().__init__(path, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        """Say nothing: the address of a Unix client is empty."""

    def address_string(self) -> str:
        return "unix"

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        try:
            body = _object(self.rfile.read(length))
            status, answer = self.server.handle_json(self.command, urlsplit(self.path).path, body)
        except ToolkitError as error:
            status, answer = 409, {"error": {"message": error.message, "hint": error.hint}}
        except Exception as error:  # whoever asked gets a word, and the log the rest
            logger.exception("%s %s", self.command, self.path)
            text = f"{self.command} {self.path} failed: {error!r}"
            status, answer = 500, {"error": {"message": text, "hint": "this is a fault of toolkit"}}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - names of the standard library
