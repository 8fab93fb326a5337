"""Lines that jobs print: while they wait, while they run, and after; of all attempts and nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.launch import report
from toolkit.launch.backend import backend_of
from toolkit.launch.folder import Attempt, JobFolder

LOOK_S = 0.3


@dataclass(frozen=True)
class Line:
    """A line of a job."""

    job: str
    attempt: int
    node: int
    text: str


@dataclass
class Tail:
    """Reads one file on from where it stopped; half a line waits for its end."""

    path: Path
    offset: int = 0
    rest: bytes = b""

    def read(self, *, last: bool = False) -> list[str]:
        """Lines since the last time; with ``last`` also one without an end."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                chunk = file.read()
        except FileNotFoundError:
            return []
        self.offset += len(chunk)
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        if last and self.rest:
            lines.append(self.rest)
            self.rest = b""
        return [line.decode(errors="replace").rpartition("\r")[2] for line in lines]


class Reader:
    """All that a job printed so far, and what it prints on."""

    def __init__(self, job: JobFolder) -> None:
        self._job = job
        self._tails: dict[Path, Tail] = {}

    def read(self, *, last: bool = False) -> Iterator[Line]:
        """Lines since the last time."""
        for attempt in self._job.attempts:
            for path in _files(attempt):
                tail = self._tails.setdefault(path, Tail(path))
                node = int(path.stem.partition("-")[2] or 0)
                for text in tail.read(last=last or attempt.ended is not None):
                    yield Line(self._job.path.name, attempt.number, node, text)


def _files(attempt: Attempt) -> list[Path]:
    return sorted(attempt.folder.glob("log*.txt"))


def lines(
    jobs: Path,
    chain: Mapping[str, Any],
    names: list[str],
    *,
    follow: bool,
    tick: Callable[[], None],
) -> Iterator[Line]:
    """Lines of some jobs of a chain.

    Args:
        jobs: The workspace's ``jobs`` folder.
        chain: ``chain.json``.
        names: Ids of the jobs.
        follow: Wait for more until all of them are over.
        tick: Called while it waits.
    """
    engine = _from_engine(jobs, chain, names)
    if engine is not None:
        yield from engine
        return
    readers = [Reader(JobFolder(jobs / chain["id"] / name)) for name in names]
    while True:
        ended = [one.state.ended for one in report.of_chain(jobs, chain) if one.id in names]
        over = all(ended) or not follow
        for reader in readers:
            yield from reader.read(last=over)
        if over:
            return
        tick()
        time.sleep(LOOK_S)


def _from_engine(jobs: Path, chain: Mapping[str, Any], names: list[str]) -> Iterator[Line] | None:
    """Lines that only the engine has; ``None`` where the jobs' folders have them."""
    if chain["backend"] == "local":
        return None
    backend = backend_of(chain["backend"], chain["options"], jobs)
    found = []
    for name in names:
        job = JobFolder(jobs / chain["id"] / name)
        submitted = job.submitted
        texts = backend.logs(job.spec, str(submitted["id"])) if submitted else None
        if texts is None:
            return None
        found.append((name, texts))
    return (Line(name, 1, 0, text) for name, texts in found for text in texts)
