"""What ``toolkit serve`` does once its inputs are there: start a supervisor, follow it, stop it or leave it running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from toolkit import errors
from toolkit.engines import orphans, records
from toolkit.engines.failures import last_lines
from toolkit.engines.records import ServerRecord
from toolkit.errors import EngineError, ToolkitError
from toolkit.recipe.serve import ServeSection
from toolkit.serving.events import EVENTS_FILE, last
from toolkit.serving.state import ServerSpec
from toolkit.stages import Input
from toolkit.workspace import private_folder

OnEvent = Callable[[Mapping[str, Any]], None]
PROGRAM = (sys.executable, "-m", "toolkit.serving")
"""What is started with the server's folder behind it."""
CLOCK_S = 0.01
"""Times of events are rounded."""
END_S = 30.0
"""What a supervisor gets beyond the drain, before it is killed."""


def adapter_paths(
    inputs: Mapping[str, Input], serve: ServeSection, name: str, recipe_dir: Path
) -> dict[str, Path]:
    """Adapters by the name that clients ask for: the trained one is ``name``, then the recipe's that are folders.

    One that came from elsewhere is the input ``adapter NAME``: the same weights with a reference beside them. Those of
    the registry are brought and proven when ``toolkit serve`` starts or follows an alias.
    """
    trained = {name: inputs["adapter"].path} if "adapter" in inputs else {}
    finished = {
        a.name: (recipe_dir / Path(a.path).expanduser()).resolve()
        for a in serve.adapters
        if a.name in a.folders
    }
    finished |= {
        name: inputs[f"adapter {name}"].path for name in finished if f"adapter {name}" in inputs
    }
    return {**trained, **finished}


def serve(
    spec: ServerSpec,
    *,
    detach: bool,
    on_event: OnEvent,
    on_ready: Callable[[ServerRecord], None],
    program: Sequence[str] = PROGRAM,
) -> ServerRecord:
    """Serve until told to stop; with ``detach`` return as soon as it is ready.

    SIGTERM and Ctrl-C stop it in order: running requests are finished; the second one ends it now.

    Args:
        spec: The server, resolved.
        detach: Leave it running.
        on_event: Told what the supervisor tells.
        on_ready: Told once, when it is ready.
        program: The supervisor's command, before the folder.

    Raises:
        ToolkitError: It did not start or cannot go on, as the supervisor said it; nothing is left running.
        KeyboardInterrupt: Ctrl-C or SIGTERM came before it was ready.
    """
    servers = spec.place.parent
    records.ensure_free(servers, spec.name)
    private_folder(spec.place)
    spec.write()
    follower = _Follower(spec, on_event, on_ready)
    with _started(spec, program) as process, _forwarded(process):
        follower.follow(process, detach=detach)
        if detach and follower.record:
            _detach(process)
            return follower.record
        code = process.wait()
    follower.read_the_end()
    records.remove(servers, spec.name)
    if follower.error:
        raise follower.error
    if code != 0 or not follower.stopped:
        raise _ended(spec, code)
    if follower.record is None:
        raise KeyboardInterrupt  # stopped before it was ready: a start was broken off
    return follower.record


class _Follower:
    """Reads a supervisor's events."""

    def __init__(
        self, spec: ServerSpec, on_event: OnEvent, on_ready: Callable[[ServerRecord], None]
    ) -> None:
        self._spec = spec
        self._on_event = on_event
        self._on_ready = on_ready
        self._place = _Place("", "")
        self._began = time.time() - CLOCK_S
        self.record: ServerRecord | None = None
        self.error: ToolkitError | None = None
        self.stopped = False

    def follow(self, process: subprocess.Popen[bytes], *, detach: bool) -> None:
        """Until the supervisor ends; with ``detach``, until it is ready."""
        assert process.stdout is not None  # noqa: S101 - made by _started
        for line in process.stdout:
            if not line.endswith(b"\n"):
                return  # it was killed within a word
            event = json.loads(line)
            self._take(event, process.pid)
            if detach and event["event"] == "ready":
                return

    def read_the_end(self) -> None:
        """How it ended, from the file, where this process was stopped (Ctrl-Z) for so long that the pipe lost it."""
        if self.error or self.stopped:
            return
        event = last(self._spec.place / EVENTS_FILE)
        if event.get("time", 0) >= self._began and event["event"] in ("error", "stopped"):
            self._take(event, 0)

    def _take(self, event: Mapping[str, Any], pid: int) -> None:
        kind = event["event"]
        if kind == "listening":
            self._place = _Place(event["url"], event["control"])
        elif kind == "ready":
            self.record = records.of(self._spec, self._place.url, self._place.control, pid)
            self._on_ready(self.record)
        elif kind == "error":
            self.error = _error(event)
        elif kind == "stopped":
            self.stopped = True
        self._on_event(event)


@dataclass(frozen=True)
class _Place:
    url: str
    control: str


def _error(event: Mapping[str, Any]) -> ToolkitError:
    """The supervisor's error in its own class, so that the exit code is right."""
    kind = getattr(errors, str(event["kind"]), EngineError)
    made: ToolkitError = EngineError(event["message"], event["hint"])
    if isinstance(kind, type) and issubclass(kind, ToolkitError):
        with contextlib.suppress(TypeError):
            made = kind(event["message"], event["hint"])
    return made


@contextlib.contextmanager
def _started(spec: ServerSpec, program: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The supervisor in a session of its own; it ends when this process does, unless it was detached."""
    log = spec.place / "supervisor.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*program, str(spec.place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,
            env=_environ(),
        )
    try:
        yield process
    except BaseException:
        _end(process, spec.section.drain_s)
        raise
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _environ() -> dict[str, str]:
    """So that ``-m toolkit.serving`` is this toolkit, and nothing of the working folder."""
    paths = [str(Path(errors.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    found = os.pathsep.join(filter(None, paths))
    return {**os.environ, "PYTHONPATH": found, "PYTHONSAFEPATH": "1"}


def _detach(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None  # noqa: S101 - made by _started
    process.stdin.write(b"d")
    process.stdin.close()
    process.returncode = 0  # not ours to wait for any more


def _end(process: subprocess.Popen[bytes], drain_s: float) -> None:
    """Something went wrong on our side: the closed pipe ends the supervisor without a drain."""
    if process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(drain_s + END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    orphans.reap()


@contextlib.contextmanager
def _forwarded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM and Ctrl-C go to the supervisor, which counts them."""

    def forward(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ended(spec: ServerSpec, code: int) -> EngineError:
    """The supervisor was killed, or failed without a word; its guards end the rest."""
    orphans.reap()
    log = spec.place / "supervisor.log"
    shown = last_lines(log.read_text(errors="replace"))
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return EngineError(f"the supervisor of {spec.name!r} {how}\n{shown}".rstrip(), f"see {log}")
