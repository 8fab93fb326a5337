"""What all processes of a server have in common: they are kept, watched and reported on in a thread of their own."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

from toolkit.engines.failures import last_lines
from toolkit.errors import EngineError, ToolkitError
from toolkit.serving.restarts import Restarts
from toolkit.serving.state import PartState

SILENT = 3
"""Questions in a row without an answer after which a process counts as hung."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """When a part counts as hung.

    Attributes:
        poll_s: Pause between two looks at a process.
        shallow_s: Pause between two questions for ``/health``.
        slow_s: What ``/health`` may take before a closer look.
        quiet_s: Without a new token for so long, an engine is asked for one.
        deep_s: What that one token may take.
        stopped_s: The same where the kernel says that the process is stopped.
    """

    poll_s: float = 0.25
    shallow_s: float = 2.0
    slow_s: float = 3.0
    quiet_s: float = 30.0
    deep_s: float = 60.0
    stopped_s: float = 4.0

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Self:
        """With some values changed."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


class Owner(Protocol):
    """What a part needs of the supervisor."""

    health: Health

    def changed(self) -> None:
        """A part's state is another now."""

    def failed(self, error: ToolkitError) -> None:
        """A part cannot go on: the whole server ends with this error."""

    def event(self, event: str, **values: Any) -> None:
        """Tell whoever watches."""


class StopRequestedError(Exception):
    """The part was told to stop while it started."""


class Part:
    """One supervised process; subclasses say what one life of it is.

    Args:
        name: ``front``, ``router``, ``replica-0``.
        owner: The supervisor.
    """

    def __init__(self, name: str, owner: Owner) -> None:
        self.name = name
        self.owner = owner
        self.restarts = Restarts()
        self.stopping = threading.Event()
        self.ready_once = threading.Event()
        self._state = PartState(name, "starting")
        # A daemon: a part that does not end holds no process back, and its guard ends what it started.
        self._thread = threading.Thread(target=self._keep, name=name, daemon=True)

    @property
    def state(self) -> PartState:
        """What ``--status`` shows."""
        return self._state

    def become(self, state: str, **values: Any) -> None:
        """Change the state and tell the supervisor, if anything is new."""
        shown = {"pid": self._state.pid, "url": self._state.url, "detail": None} | values
        new = PartState(self.name, state, restarts=self.restarts.total, **shown)
        if new != self._state:
            self._state = new
            self.owner.changed()

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the process; returns at once, :meth:`join` waits."""
        self.stopping.set()

    def join(self, timeout_s: float) -> bool:
        """Wait until nothing is left; whether that is so."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def live(self) -> None:
        """One life: start, say ready, return when told to stop.

        Raises:
            ToolkitError: It did not start, or ended, or hung.
            StopRequestedError: It was told to stop before it was ready.
        """
        raise NotImplementedError

    def _keep(self) -> None:
        try:
            while not self.stopping.is_set() and self._live_once():
                pass
        finally:
            self.become("stopped", pid=None)

    def _live_once(self) -> bool:
        """Whether it may live again."""
        try:
            self.live()
        except StopRequestedError:
            return False
        except ToolkitError as error:
            return self._may_start_again(error)
        except Exception as error:  # a fault of ours must not leave a server up in name only
            logger.exception("%s", self.name)
            self.owner.failed(EngineError(f"{self.name}: {error!r}", "this is a fault of toolkit"))
            return False
        return False

    def _may_start_again(self, error: ToolkitError) -> bool:
        if self.stopping.is_set():
            return False
        if not self.ready_once.is_set():
            self.owner.failed(error)
            return False
        delay = self.restarts.next_delay()
        if delay is None:
            text = f"{self.name} ended again after {self.restarts.spent}: {error.message}"
            self.owner.failed(EngineError(text, error.hint))
            return False
        self.owner.event("restart", part=self.name, cause=error.message, delay_s=delay)
        self.become("waiting", pid=None, detail=error.message)
        return not self.stopping.wait(delay)


class Answering(Part):
    """A part whose process answers a simple question at once, or hangs: the front, the router.

    Args:
        name: See :class:`Part`.
        owner: The supervisor.
        log: What the process prints.
    """

    def __init__(self, name: str, owner: Owner, log: Path) -> None:
        super().__init__(name, owner)
        self.log = log
        self.may_end = False
        """It was told to end by itself."""

    def ask(self) -> None:
        """Ask the question.

        Raises:
            EngineError: There is no answer.
        """
        raise NotImplementedError

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Return when it is to end, or did as it was told.

        Raises:
            EngineError: It ended, or hangs.
        """
        silent, asked = 0, time.monotonic()
        while not self.stopping.wait(self.owner.health.poll_s):
            if self.may_end and process.poll() is not None:
                return
            self.check(process)
            if time.monotonic() - asked < self.owner.health.shallow_s:
                continue
            try:
                self.ask()
                silent = 0
            except EngineError as error:
                silent += 1
                if silent >= SILENT:
                    text = f"the {self.name} hangs: {error.message}"
                    raise EngineError(text, self.hint) from None
            asked = time.monotonic()

    def check(self, process: subprocess.Popen[bytes]) -> None:
        """Raise :class:`EngineError` with its last words if it ended."""
        code = process.poll()
        if code is not None:
            text = last_lines(self.log.read_text(errors="replace"))
            raise EngineError(f"the {self.name} ended with exit code {code}\n{text}", self.hint)

    @property
    def hint(self) -> str:
        """Where to look."""
        return f"its log is {self.log}"
