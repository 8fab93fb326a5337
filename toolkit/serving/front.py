"""The front's process: started before the engines, told a new table at every change, started again when it dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import EngineError
from toolkit.gateway.settings import GatewaySettings
from toolkit.gateway.table import Table
from toolkit.serving.control import request
from toolkit.serving.parts import Answering, Owner, StopRequestedError

START_S = 60.0
"""What the front may take to listen: imports on a busy machine."""
ANSWER_S = 5.0
END_S = 3.0
"""What it gets between SIGTERM and SIGKILL; its requests are drained before."""


class Front(Answering):
    """See :mod:`toolkit.gateway`.

    Args:
        owner: The supervisor.
        settings: What it is started with; the port is a fixed one, held by the supervisor.
        place: Folder for its settings and log.
        table: The first table.
    """

    def __init__(self, owner: Owner, settings: GatewaySettings, place: Path, table: Table) -> None:
        super().__init__("front", owner, place / "front.log")
        self.settings = settings
        self._file = place / "front.json"
        self._table = table
        self._sending = threading.Lock()
        self._sent = False
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{settings.port}"

    def push(self, make: Callable[[], Table]) -> None:
        """Send a table, made when it is its turn; a front that does not take it gets it when it answers again.

        Raises:
            EngineError: It did not take the table.
        """
        with self._sending:
            self._table, self._sent = make(), False
            self._send()

    def _send(self) -> None:
        control = self.settings.control
        request(control, "PUT", "/table", self._table.to_json(), timeout_s=ANSWER_S)
        self._sent = True

    def status(self) -> dict[str, Any]:
        """What the front counts.

        Raises:
            EngineError: It does not answer.
        """
        return request(self.settings.control, "GET", "/status", timeout_s=ANSWER_S)

    @property
    def is_idle(self) -> bool:
        """Whether no request is open; one that is too busy to say so has some."""
        try:
            return not self.status().get("open")
        except EngineError:
            return self.state.state != "ready"

    def drain(self, deadline_s: float, *, timeout_s: float = ANSWER_S) -> None:
        """Tell it to take no new requests, and to break off at the deadline what is open then.

        Raises:
            EngineError: It does not answer.
        """
        self.may_end = True  # when all is answered
        body: Mapping[str, Any] = {"deadline_s": deadline_s}
        request(self.settings.control, "POST", "/drain", body, timeout_s=timeout_s)

    def ask(self) -> None:
        """See :class:`Answering`; a table that was lost is sent again."""
        with self._sending:
            if not self._sent:
                self._send()
                return
        self.status()

    def live(self) -> None:
        """One life of the process."""
        process = self._spawn()
        try:
            self.become("starting", pid=process.pid, url=self.url)
            self._await_answer(process)
            self.become("ready", pid=process.pid, url=self.url)
            self.ready_once.set()
            self.watch(process)
        finally:
            _end(process)

    def _spawn(self) -> subprocess.Popen[bytes]:
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(self.settings.model_dump_json(indent=1))
        with contextlib.suppress(FileNotFoundError):
            self.settings.control.unlink()
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "toolkit.gateway", str(self._file)],
                stdin=subprocess.PIPE,  # its end tells the front that its supervisor is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        while True:
            self.check(process)
            with contextlib.suppress(EngineError), self._sending:
                self._send()
                return
            if time.monotonic() > deadline:
                raise EngineError(f"the front did not listen in {START_S:.0f} s", self.hint)
            if self.stopping.wait(0.1):
                raise StopRequestedError


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin:
        process.stdin.close()
