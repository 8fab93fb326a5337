"""Servers of a workspace: one JSON file each, so that another command can find, question and stop them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.engines import guard, orphans
from toolkit.errors import EngineError, UsageError
from toolkit.registry import close_match
from toolkit.serving.control import forget_sockets, request
from toolkit.serving.state import ServerSpec, ServerStatus
from toolkit.workspace import private_folder

ANSWER_S = 3.0
END_S = 40.0
"""What a supervisor gets beyond the drain, before it is killed."""


@dataclass(frozen=True)
class ServerRecord:
    """A running server; ``pid`` and ``started`` together name its supervisor, so a reused id is not mistaken for it."""

    name: str
    url: str
    models: Mapping[str, str]
    engine: str
    model: str
    pid: int
    started: int
    log: str
    detached: bool
    control: str = ""
    """The supervisor's Unix socket."""

    @property
    def lives(self) -> bool:
        """Whether the supervisor still runs."""
        return guard.start_time(self.pid) == self.started

    def status(self) -> ServerStatus:
        """What the supervisor says now.

        Raises:
            EngineError: It does not answer.
        """
        return ServerStatus.from_json(
            request(Path(self.control), "GET", "/status", timeout_s=ANSWER_S)
        )


def of(spec: ServerSpec, url: str, control: str, pid: int) -> ServerRecord:
    """The record of a server whose supervisor is ``pid``."""
    names = [spec.base_name, *dict.fromkeys(adapter.name for adapter in spec.adapters)]
    return ServerRecord(
        name=spec.name,
        url=url,
        models={name: name for name in names},
        engine=spec.section.engine,
        model=spec.model,
        pid=pid,
        started=guard.start_time(pid) or 0,
        log=str(spec.place / "engine-0.log"),
        detached=spec.detached,
        control=control,
    )


def write(folder: Path, record: ServerRecord) -> None:
    """Add a record.

    Raises:
        EngineError: A living server has this name.
    """
    file = private_folder(folder) / f"{record.name}.json"
    ensure_free(folder, record.name)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(asdict(record), indent=2))
    part.replace(file)


def ensure_free(folder: Path, name: str) -> None:
    """Refuse a name that a living server has.

    Raises:
        EngineError: It has.
    """
    for record in living(folder):
        if record.name == name:
            raise EngineError(
                f"a server named {name!r} runs already at {record.url}",
                f"stop it with `toolkit serve --stop {name}`, or name this one with --set serve.name=OTHER",
            )


def remove(folder: Path, name: str) -> None:
    """Forget a server."""
    (folder / f"{name}.json").unlink(missing_ok=True)


def living(folder: Path) -> list[ServerRecord]:
    """Servers that run, by name; records of dead ones are removed."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):
            record = ServerRecord(**json.loads(file.read_text()))
            if record.lives:
                found.append(record)
            else:
                _forget(file, record)
    return found


def _forget(file: Path, record: ServerRecord) -> None:
    """A supervisor that was killed could not clean up."""
    file.unlink(missing_ok=True)
    if record.control:
        forget_sockets(Path(record.control))
    orphans.reap()


def pick(folder: Path, name: str | None) -> ServerRecord:
    """The server called ``name``, or the only one.

    Raises:
        UsageError: None runs, none has the name, or there are several and no name is given.
    """
    running = {record.name: record for record in living(folder)}
    if not running:
        raise UsageError(f"no server of {folder} runs", "start one: toolkit serve RECIPE --detach")
    if name is None and len(running) > 1:
        raise UsageError(f"several servers run: {', '.join(running)}", "say which one")
    if name is not None and name not in running:
        raise UsageError(
            f"no server named {name!r} runs{close_match(name, running)}",
            f"running: {', '.join(running)}",
        )
    return running[name or next(iter(running))]


def stop(folder: Path, record: ServerRecord, drain_s: float | None = None) -> None:
    """End a server: running requests are finished first, nothing of it is left.

    Args:
        folder: The workspace's servers.
        record: The server.
        drain_s: What running requests get; the recipe's ``serve.drain_s`` unless given.
    """
    limit = _ask_to_stop(record, drain_s)
    deadline = time.monotonic() + limit + END_S
    while record.lives and time.monotonic() < deadline:
        time.sleep(0.1)
    if record.lives:
        os.kill(record.pid, signal.SIGKILL)
        while record.lives:
            time.sleep(0.05)
    orphans.reap()
    remove(folder, record.name)


def _ask_to_stop(record: ServerRecord, drain_s: float | None) -> float:
    """Over the control socket, by a signal where that does not answer; seconds that it will drain."""
    body = {} if drain_s is None else {"drain_s": drain_s}
    try:
        told = request(Path(record.control), "POST", "/stop", body, timeout_s=ANSWER_S)
    except EngineError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
        return drain_s or 0.0
    return float(told["drain_s"])
