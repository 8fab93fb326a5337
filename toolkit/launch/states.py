"""States and causes: the words for every engine, and what they lead to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

Meaning = TypeVar("Meaning")


class State(StrEnum):
    """How a job is, whatever engine has it."""

    queued = "queued"
    """Handed over, waiting for a place or for another job."""
    starting = "starting"
    """A place is given; the program does not run yet."""
    running = "running"
    preempted = "preempted"
    """It was told to give its place back and kept a checkpoint; it will be started again."""
    retrying = "retrying"
    """It failed for a cause that another try may mend; it waits for that try."""
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing will change it any more."""
        return self in (State.succeeded, State.failed, State.cancelled)


class Cause(StrEnum):
    """Why an attempt ended."""

    done = "done"
    preempted = "preempted"
    """Told to stop, by the scheduler or ahead of the time limit; a checkpoint is kept."""
    lost = "lost"
    """Its machine, or whatever watched it there, is gone: heartbeats ended without a word."""
    cancelled = "cancelled"
    upstream = "upstream"
    """A job that it needs failed or was cancelled; it never ran."""
    out_of_memory = "out_of_memory"
    time_limit = "time_limit"
    """The time limit came and nothing was kept that a next attempt could go on from."""
    usage = "usage"
    """Recipe, data or command are wrong (exit code 2)."""
    not_installed = "not_installed"
    failed = "failed"
    """Everything else: the work was tried and failed."""

    @property
    def retried(self) -> bool:
        """Whether another try may help: the job did nothing wrong."""
        return self in (Cause.preempted, Cause.lost)


PREEMPTED = 75
"""Exit code of an attempt that kept a checkpoint and wants to go on (``EX_TEMPFAIL`` of sysexits.h)."""


@dataclass(frozen=True)
class Seen:
    """What an engine says of one job, in our words and in its own.

    Attributes:
        state: Ours.
        word: The engine's own, such as ``PD`` or ``CrashLoopBackOff``.
        reason: Why it waits or ended, in the engine's words.
        exit_code: Of the program, where the engine knows it.
        host: Where it runs or ran.
        cause: Why it ended, where the engine knows: a program killed for its memory cannot tell.
    """

    state: State
    word: str
    reason: str | None = None
    exit_code: int | None = None
    host: str | None = None
    cause: Cause | None = None


def translate(engine: str, table: Mapping[str, Meaning], word: str) -> Meaning:
    """A word of an engine in ours.

    Raises:
        UnknownStateError: The table lacks it; guessing would lose or repeat work.
    """
    from toolkit.errors import UnknownStateError

    try:
        return table[word]
    except KeyError:
        raise UnknownStateError(
            f"{engine} says that a job is {word!r}, which is in no table of ours",
            f"known: {', '.join(sorted(table))}; please report it with the version of {engine}",
        ) from None
