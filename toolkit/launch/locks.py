"""Locks of files that live as long as a process, or those it gave them to: the kernel frees them, however it ends.

A lock belongs to the open file, not to the process. So the keeper takes the places of a job (a GPU, the job itself),
gives the open files to the shim, and the shim to the worker: there is no moment at which nobody holds them, and they
are free when the last of these processes is gone.

The only way to ask for such a lock is to take it. A check takes it shared, so that checks do not meet each other, and
who wants a lock that is checked tries for CHECK_S.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

HELD = "TOOLKIT_HELD"
"""Environment variable: descriptors of locked files that were handed down, with commas."""

CHECK_S = 0.2
"""Longer than any :func:`is_held` has a lock, also on a busy machine."""

_ours: list[int] = []


def inherited() -> tuple[int, ...]:
    """Descriptors of locks that were handed down to this process, or that :func:`hold` took in it."""
    given = [int(one) for one in os.environ.get(HELD, "").split(",") if one]
    return tuple(dict.fromkeys((*(fd for fd in given if _is_open(fd)), *_ours)))


def hold(path: Path) -> int | None:
    """Lock ``path``, or find that a lock of it was handed down; ``None`` where another process has it."""
    descriptor = _open(path)
    same = os.fstat(descriptor)
    for given in inherited():
        if os.path.samestat(os.fstat(given), same):
            os.close(descriptor)
            return given
    if not take(descriptor, seconds=CHECK_S):
        os.close(descriptor)
        return None
    _ours.append(descriptor)
    return descriptor


def is_held(path: Path) -> bool:
    """Whether some process has the lock of ``path`` now."""
    if not path.exists():
        return False
    descriptor = _open(path)
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def take(descriptor: int, *, seconds: float = 0.0) -> bool:
    """Lock an open file unless another one has it, and keeps it for so many seconds."""
    end = time.monotonic() + seconds
    while not _try(descriptor, fcntl.LOCK_EX):
        if time.monotonic() >= end:
            return False
        time.sleep(0.005)
    return True


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def let_go(descriptor: int) -> None:
    """Give a lock of :func:`hold` back."""
    _ours.remove(descriptor)
    os.close(descriptor)
