"""How an attempt ended: the cause, and what it means for the engine."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from toolkit.launch import causes
from toolkit.launch.folder import Attempt, JobFolder
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import PREEMPTED, Cause


@dataclass
class Told:
    """What the shim was told while the worker ran."""

    signal: int | None = None
    at: float = 0.0
    """When, by the monotonic clock."""
    time_limit: bool = False
    cancelled: bool = False

    def note(self, number: int, at: float, *, time_limit: bool = False) -> None:
        """Take a word of a coming end; the first one counts."""
        if self.signal is None:
            self.signal, self.at, self.time_limit = number, at, time_limit

    def cancel(self, at: float) -> None:
        """Somebody asked for its end; from now on there is less time."""
        self.cancelled = True
        self.signal, self.at = self.signal or signal.SIGTERM, at


def cause_of(
    job: JobFolder, attempt: Attempt, told: Told, code: int, killed_by_kernel: bool
) -> tuple[Cause, str | None]:
    """The cause and a message for people."""
    if code == 0:
        return Cause.done, None
    if told.cancelled or job.cancelled:
        return Cause.cancelled, "cancelled while it ran"
    if told.time_limit:
        return _at_the_limit(job.spec, job.kept_since((attempt.started or {})["at"]))
    if told.signal is not None:
        return Cause.preempted, f"told to stop by {signal.Signals(told.signal).name}"
    if said := attempt.said:
        return Cause(said["cause"]), said["message"]
    cause = causes.of_exit(code, killed_by_kernel)
    return cause, f"its process {causes.shown(code)}: {attempt.last_line()}"


def _at_the_limit(spec: JobSpec, kept: bool) -> tuple[Cause, str]:
    limit = f"the time limit of {spec.resources.time_limit_s} s"
    if kept:
        return Cause.preempted, f"{limit} was near; what is done is kept"
    return Cause.time_limit, f"{limit} came, and nothing was kept that a next try could go on from"


def exit_code(end: dict[str, Any]) -> int:
    """What the engine is told: 0, 75 to start it again, else the worker's own or 1."""
    if end["cause"] == Cause.done:
        return 0
    if end["again"]:
        return PREEMPTED
    code = int(end["exit_code"])
    return code if 0 < code < 128 and code != PREEMPTED else 1
