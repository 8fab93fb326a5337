"""A job's own folder: what is known of it without asking any engine.

::

    <workspace>/jobs/arrays/*.sh        scripts of arrays that were handed over
    <workspace>/jobs/<chain>/
    ├── chain.json                  what was asked, by whom, when; the MLflow parent run
    ├── recipe.yaml, lock, source/  the snapshot: later edits change nothing
    └── <job id>/
        ├── job.json                the spec
        ├── step.json               what the worker reads
        ├── array.json              the array that it is, or would be, a task of: its name, which task, which round
        ├── submitted.json          the engine's id, and what was sent (absent: never handed over)
        ├── cancelled.json          somebody asked for its end: when, who
        ├── retried.json            somebody asked for new tries: when, which round
        ├── lock                    held by the shim and its worker while they live
        └── attempts/1/
            ├── started.json        host, pid, GPUs, engine id, time
            ├── beat                touched every BEAT_S seconds
            ├── log.txt             of node 0; log-1.txt of the next one; ranks write into their node's
            ├── said.json           the worker's error and its cause, where it could say so
            └── ended.json          exit code, cause, message, whether something was kept, time
"""

from __future__ import annotations

import json
import os
import sys
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
NO_WORK = ("log.txt", "step.json", "result.json", "mlflow.json", "error.json", "rank-*", "again-*")
"""Patterns of files in a step's state folder that are no work done: words of the worker and of ranks."""


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

    @property
    def said(self) -> dict[str, Any] | None:
        """The worker's own error: type, message, hint, cause."""
        return read(self.folder / "said.json")

    def beat(self) -> None:
        """Say that it lives."""
        (self.folder / "beat").touch()

    def beat_age_s(self, now: float | None = None) -> float | None:
        """Seconds since the last heartbeat; ``None`` when there was none."""
        try:
            return (now or time.time()) - (self.folder / "beat").stat().st_mtime
        except FileNotFoundError:
            return None

    def is_silent(self, *, left: bool = False) -> bool:
        """Whether its heartbeats stopped long ago; not so long where the engine says that it has ``left``."""
        return (self.beat_age_s() or 0.0) > (LOST_S / 3 if left else LOST_S)

    def log(self, node: int = 0) -> Path:
        """What a node's processes print."""
        return self.folder / ("log.txt" if node == 0 else f"log-{node}.txt")

    def last_line(self, node: int = 0) -> str:
        """The last that a node printed."""
        try:
            text = self.log(node).read_bytes()[-4000:].decode(errors="replace").strip()
        except FileNotFoundError:
            text = ""
        return text.splitlines()[-1] if text else "it printed nothing"


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
        """``id`` of the engine, ``at``, and ``text`` that was sent, or the ``array`` whose script that was.

        ``None`` if it was never handed over.
        """
        return read(self.path / "submitted.json")

    @property
    def array(self) -> dict[str, Any] | None:
        """``name``, ``task`` and ``round`` of the last array that it was put into; written before that is sent."""
        return read(self.path / "array.json")

    @property
    def done(self) -> bool:
        """Whether its last attempt succeeded."""
        return any((one.ended or {}).get("cause") == "done" for one in self.attempts[-1:])

    @property
    def cancelled(self) -> dict[str, Any] | None:
        """Who asked for its end, and when."""
        return read(self.path / "cancelled.json")

    @property
    def retried(self) -> dict[str, Any]:
        """The last ``toolkit jobs retry``: its ``round`` (1 before any), and the attempts ``before`` it."""
        return read(self.path / "retried.json") or {"round": 1, "before": 0}

    @property
    def lock(self) -> Path:
        """Held by the shim and its worker while they live."""
        return self.path / "lock"

    @property
    def command(self) -> list[str]:
        """What the shim starts: ``argv`` of ``command.json``, or the worker with the job's step file."""
        given = read(self.path / "command.json")
        if given:
            return [str(word) for word in given["argv"]]
        return [sys.executable, "-P", "-m", "toolkit.worker", str(self.path / "step.json")]

    @property
    def state(self) -> Path | None:
        """Where checkpoints and the like are kept over attempts."""
        step = read(self.path / "step.json") or {}
        return Path(step["spec"]["state"]) if step else self.path / "state"

    def kept_since(self, moment: float) -> bool:
        """Whether anything was written since then that a next attempt can go on from."""
        state = self.state
        if state is None or not state.is_dir():
            return False
        entries = (one for one in state.iterdir() if not any(map(one.match, NO_WORK)))
        files = (f for e in entries for f in ([e] if e.is_file() else e.rglob("*")))
        return any(file.is_file() and file.stat().st_mtime >= moment for file in files)

    @property
    def ends(self) -> list[dict[str, Any]]:
        """How the attempts since the last ``retry`` ended; one that ended without a word is ``lost``."""
        ours = self.attempts[self.retried["before"] :]
        return [attempt.ended or self.lost(attempt) for attempt in ours]

    def lost(self, attempt: Attempt) -> dict[str, Any]:
        """The end of an attempt that has none: whatever watched it is gone."""
        begun = (attempt.started or {}).get("at", 0.0)
        last = (attempt.beat_age_s() or 0.0) if begun else 0.0
        return {
            "at": time.time() - last,
            "cause": "lost",
            "exit_code": None,
            "kept": bool(begun) and self.kept_since(begun),
            "message": "it ended without a word: its machine, or what watched it there, is gone",
            "hint": None,
        }

    def close_lost(self) -> None:
        """Write the end of attempts that left none; only for who holds the job's lock."""
        for attempt in self.attempts:
            if attempt.ended is None:
                write(attempt.folder / "ended.json", self.lost(attempt))

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
    """Write JSON so that readers see all of it or none, also after the power went off; keys keep their order."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
