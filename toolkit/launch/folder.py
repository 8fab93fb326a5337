"""A job's own folder: what is known of it without asking any engine.

::

    <workspace>/jobs/<chain>/
    ├── chain.json                  what was asked, by whom, when; the MLflow parent run
    ├── recipe.yaml, lock, source/  the snapshot: later edits change nothing
    └── <job id>/
        ├── job.json                the spec
        ├── step.json               what the worker reads
        ├── submitted.json          the engine's id, and what was sent (absent: never handed over)
        ├── cancelled.json          somebody asked for its end: when, who
        └── attempts/1/
            ├── started.json        host, pid, process group, GPUs, engine id, time
            ├── beat                touched every BEAT_S seconds
            ├── log.txt             of node 0; log-1.txt of the next one; ranks write into their node's
            └── ended.json          exit code, cause, message, time
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.launch.spec import JobSpec
from toolkit.workspace import private_folder

BEAT_S = 10.0
"""Between two heartbeats."""
LOST_S = 90.0
"""Without a heartbeat for so long a job that should run is lost."""


@dataclass(frozen=True)
class Attempt:
    """One start of a job."""

    folder: Path

    @property
    def number(self) -> int:
        """From 1."""
        return int(self.folder.name)

    @property
    def started(self) -> dict[str, Any] | None:
        """Host, pid, GPUs, time; ``None`` before the shim ran."""
        return read(self.folder / "started.json")

    @property
    def ended(self) -> dict[str, Any] | None:
        """Exit code, cause, message, time; ``None`` while it runs, and when it died without a word."""
        return read(self.folder / "ended.json")

    def beat_age_s(self, now: float | None = None) -> float | None:
        """Seconds since the last heartbeat; ``None`` when there was none."""
        try:
            return (now or time.time()) - (self.folder / "beat").stat().st_mtime
        except FileNotFoundError:
            return None

    def log(self, node: int = 0) -> Path:
        """What a node's processes print."""
        return self.folder / ("log.txt" if node == 0 else f"log-{node}.txt")


@dataclass(frozen=True)
class JobFolder:
    """Reads and writes the files of one job; each is written whole or not at all."""

    path: Path

    @property
    def spec(self) -> JobSpec:
        """The job."""
        return JobSpec.read(self.path)

    @property
    def submitted(self) -> dict[str, Any] | None:
        """``id`` of the engine, ``at``, ``text`` that was sent; ``None`` if it was never handed over."""
        return read(self.path / "submitted.json")

    @property
    def cancelled(self) -> dict[str, Any] | None:
        """Who asked for its end, and when."""
        return read(self.path / "cancelled.json")

    @property
    def attempts(self) -> list[Attempt]:
        """All starts, the first one first."""
        found = (self.path / "attempts").glob("[0-9]*")
        return [Attempt(one) for one in sorted(found, key=lambda one: int(one.name))]

    @property
    def coming(self) -> int:
        """Number of the attempt that a start now would be: engines that want a new name for each start add it."""
        attempts = self.attempts
        return attempts[-1].number + 1 if attempts else 1

    def next_attempt(self) -> Attempt:
        """Make the folder of a new start; two at once get two."""
        number = self.attempts[-1].number if self.attempts else 0
        while True:
            number += 1
            folder = private_folder(self.path / "attempts") / str(number)
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                continue
            return Attempt(folder)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write one of the JSON files."""
        write(self.path / name, content)


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file, or ``None`` where it is not there."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that readers see all of it or none, also after the power went off."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
