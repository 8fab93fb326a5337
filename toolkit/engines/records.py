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
from toolkit.workspace import private_folder


@dataclass(frozen=True)
class ServerRecord:
    """A running server; ``pid`` and ``started`` together name its guard, so a reused id is not mistaken for it."""

    name: str
    url: str
    models: Mapping[str, str]
    engine: str
    model: str
    pid: int
    started: int
    log: str
    detached: bool

    @property
    def lives(self) -> bool:
        """Whether the guard still runs."""
        return guard.start_time(self.pid) == self.started


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
                file.unlink(missing_ok=True)
    return found


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


def stop(folder: Path, record: ServerRecord, timeout_s: float = 40.0) -> None:
    """End a server: running requests are finished first, nothing of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while record.lives and time.monotonic() < deadline:
        time.sleep(0.1)
    if record.lives:
        os.kill(record.pid, signal.SIGKILL)
        while record.lives:
            time.sleep(0.05)
    orphans.reap()
    remove(folder, record.name)
