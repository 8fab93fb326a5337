"""What is to be said to MLflow, on disk first: an append-only file, and how much MLflow has.

::

    <workspace>/tracking/<key>/
    ├── outbox.jsonl      one record a line: create, params, tags, metrics, file, finish, ...
    ├── mlflow.json       run id, bytes delivered, whether the last delivery is in doubt
    ├── lock              held by the process that writes the outbox, for as long as it lives
    └── config.json, ...  texts that become artifacts

A folder is removed when all of it was delivered, so what is left here is what MLflow missed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

from toolkit.errors import TrackingError
from toolkit.workspace import private_folder

LAST_WORDS = ("finish", "leave")
FIRST_WORDS = ("create", "again")


@dataclass(frozen=True)
class Record:
    """One line of the outbox.

    Attributes:
        op: What to do.
        values: With what.
        end: Offset in the file after this line, in bytes.
    """

    op: str
    values: dict[str, Any]
    end: int


@dataclass(frozen=True)
class Delivered:
    """What MLflow is known to have.

    Attributes:
        run_id: The MLflow run, once it exists.
        model_id: The logged model, once it exists.
        offset: Bytes of the outbox that were delivered.
        in_doubt: A delivery after ``offset`` was begun and its outcome is not known.
        refused: Reasons why MLflow refused single records; those are not sent again.
    """

    run_id: str | None = None
    model_id: str | None = None
    offset: int = 0
    in_doubt: bool = False
    refused: tuple[str, ...] = ()


class Outbox:
    """The outbox of one run. :meth:`put` only writes to disk, so it never waits for a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: IO[str] | None = None
        self._writing = threading.Lock()

    @classmethod
    def create(cls, root: Path, name: str) -> Self:
        """A new outbox under ``root``, held by this process."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        box = cls(private_folder(root / f"{stamp}-{name}-{uuid.uuid4().hex[:8]}"))
        box.hold()
        return box

    @classmethod
    def keyed(cls, root: Path, key: str) -> Self:
        """The outbox of a run that goes on over several processes, one after the other; held by this one.

        What an earlier process wrote and could not deliver is still in it. Where somebody delivers that just now,
        another folder beside it is taken: the key leads to the same run.
        """
        for place in (key, key, key, *(f"{key}.{n}" for n in range(2, 100))):
            box = cls(private_folder(root / place))
            if box.hold() and (box.folder / "lock").exists():  # not just removed by who held it
                box.mend()
                return box
            time.sleep(0.2)
        raise TrackingError(f"{root / key} is held by another process", "wait until it ended")

    def hold(self) -> bool:
        """Take the lock, which ends with this process; ``False`` if another one has it."""
        try:
            lock = (self.folder / "lock").open("a")
        except FileNotFoundError:  # its owner delivered all and removed it
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def put(self, op: str, **values: Any) -> None:
        """Append a record."""
        line = json.dumps({"op": op, **values}) + "\n"
        with self._writing, self._file.open("ab") as file:
            file.write(line.encode())

    def keep_text(self, name: str, text: str) -> Path:
        """Write ``text`` into a file beside the outbox, for a later upload."""
        path = self.folder / name
        path.write_text(text)
        return path

    def mend(self) -> None:
        """End a line that a crash tore, so that the next record starts on its own."""
        with self._file.open("ab+") as file:
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")

    def records(self, offset: int) -> Iterator[Record]:
        """Whole records after ``offset``; a line that a crash tore is passed over."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                record = _parsed(line)
                if record is not None:
                    yield Record(record.pop("op"), record, offset)

    def empty(self) -> bool:
        """Whether nothing was recorded."""
        return not any(True for _ in self.records(0))

    def finished(self) -> bool:
        """Whether its writer said that this is all: the run's end, or that another process goes on with it."""
        last = "create"
        for record in self.records(0):
            last = record.op if record.op in (*LAST_WORDS, *FIRST_WORDS) else last
        return last in LAST_WORDS

    @property
    def delivered(self) -> Delivered:
        """What is known to have arrived."""
        path = self.folder / "mlflow.json"
        if not path.exists():
            return Delivered()
        values = json.loads(path.read_text())
        return Delivered(**values | {"refused": tuple(values["refused"])})

    def note(self, delivered: Delivered, **changes: Any) -> Delivered:
        """Record ``delivered`` with ``changes``, in one piece or not at all; return it."""
        changed = replace(delivered, **changes)
        part = self.folder / "mlflow.json.part"
        part.write_text(json.dumps(asdict(changed)))
        part.replace(self.folder / "mlflow.json")
        return changed

    def remove(self) -> None:
        """Forget the outbox: all of it was delivered."""
        try:
            # A forwarder that was given up may still write; what it leaves is replayed as nothing.
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self.release()

    @property
    def _file(self) -> Path:
        return self.folder / "outbox.jsonl"


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "op" in record else None
