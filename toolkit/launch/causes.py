"""Why an attempt ended: from an error's type and words, from an exit code, and from what the kernel counted."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path

from toolkit import errors
from toolkit.launch.states import Cause

OUT_OF_MEMORY = ("out of memory", "outofmemory")
"""Words of torch, of the kernel and of our own errors, in lower case; the hint about SIGKILL is no such word."""

GUESS = "(SIGKILL that nobody sent is the kernel out of memory)"
"""What a step's error adds to a SIGKILL; whether it is so, the kernel's counter tells."""

STOPPED = "(SIGTERM)"
"""In the error of a stage that was asked to stop and kept a checkpoint."""


def oom_kills() -> int:
    """How many processes the kernel ended for want of memory, on this machine or in this control group."""
    return max((_counted(path) for path in (Path("/proc/vmstat"), *_groups())), default=0)


def _groups() -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.partition("::")[2] for line in lines if line.startswith("0::")), "/")
    root = Path("/sys/fs/cgroup")
    return [root / own.lstrip("/") / "memory.events", root / "memory.events"]


def _counted(path: Path) -> int:
    try:
        words = path.read_text().split()
    except OSError:
        return 0
    return next((int(n) for name, n in pairwise(words) if name == "oom_kill"), 0)


def of_error(error: errors.ToolkitError, killed_by_kernel: bool) -> Cause:
    """Why a worker failed that could still say so.

    Args:
        error: What it said.
        killed_by_kernel: Whether the kernel ended a process for want of memory meanwhile.
    """
    text = str(error).replace(GUESS, "")
    if STOPPED in text:
        return Cause.preempted
    if "SIGKILL" in text:
        return Cause.out_of_memory if killed_by_kernel else Cause.lost
    if any(word in text.lower() for word in OUT_OF_MEMORY):
        return Cause.out_of_memory
    if isinstance(error, errors.NotInstalledError):
        return Cause.not_installed
    if error.exit_code == errors.UsageError.exit_code or isinstance(error, errors.DataError):
        return Cause.usage
    return Cause.failed


def of_exit(code: int, killed_by_kernel: bool) -> Cause:
    """Why a process ended that left no word: from its exit code, negative for a signal."""
    if code == 0:
        return Cause.done
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Cause.out_of_memory if killed_by_kernel else Cause.lost
    if code in (
        -signal.SIGTERM,
        128 + signal.SIGTERM,
    ):  # asked to stop, by somebody who did not ask the shim
        return Cause.preempted
    return {2: Cause.usage, 3: Cause.not_installed}.get(code, Cause.failed)


def shown(code: int) -> str:
    """An exit code for people: ``ended with 3``, ``was ended by SIGKILL``."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def host() -> str:
    """This machine's name."""
    return os.uname().nodename
