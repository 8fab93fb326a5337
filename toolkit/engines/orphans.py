"""The net under the guard: when a guard was killed, what its engine started is found and ended.

A guard leaves a record while it lives. Two signs lead from the record to the processes: their session is the guard's
(it survives the renaming of a process, which wipes its environment: vLLM's ``EngineCore`` does that), or the mark in
their environment is the guard's (it survives a session of one's own).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from toolkit.engines.guard import MARK, processes, send, start_time, stat_fields
from toolkit.workspace import cache_root, private_folder


def records_folder() -> Path:
    """Where guards leave their records, for their owner alone."""
    return private_folder(cache_root() / "guards")


def reap(deadline_s: float = 10.0) -> list[int]:
    """End what dead guards of this user left behind, remove their records, and return the ids of the ended.

    It finds the orphans of earlier runs too, so it is called before each start.
    """
    ended: list[int] = []
    deadline = time.monotonic() + deadline_s
    for file in records_folder().glob("*.json"):
        record = _Record.read(file)
        if record is None or record.guard_lives:
            continue
        while (found := record.processes()) and time.monotonic() < deadline:
            ended += [pid for pid in found if pid not in ended]
            send(set(found), signal.SIGKILL)
            time.sleep(0.05)
        if not found:
            file.unlink(missing_ok=True)
    return ended


@dataclass(frozen=True)
class _Record:
    mark: str
    python: str

    @classmethod
    def read(cls, file: Path) -> _Record | None:
        """Read a record; ``None`` for one of another PID namespace (a container's), or one that is being written."""
        try:
            record = cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return (
            record if record.mark.startswith(f"{Path('/proc/self/ns/pid').readlink()} ") else None
        )

    @property
    def guard(self) -> int:
        return int(self.mark.split(" ")[1])

    @property
    def guard_lives(self) -> bool:
        return start_time(self.guard) == int(self.mark.split(" ")[2])

    def processes(self) -> list[int]:
        """Living processes that belong to this record's engine."""
        # If the guard's id went to another process, the kernel saw that none of its session is left.
        session = str(self.guard) if start_time(self.guard) is None else None
        found = []
        for pid in processes():
            with contextlib.suppress(OSError):  # another user's, or gone
                if self._owns(Path("/proc", str(pid)), session):
                    found.append(pid)
        return found

    def _owns(self, process: Path, session: str | None) -> bool:
        fields = stat_fields(int(process.name))
        if process.stat().st_uid != os.getuid() or fields[0] in "ZX":
            return False
        if fields[3] == session and os.path.realpath(process / "exe") == self.python:
            return True
        return f"{MARK}={self.mark}".encode() in (process / "environ").read_bytes().split(b"\0")
