"""What people order of sweeps: drive, cancel, try again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from toolkit import errors, resources
from toolkit.launch import causes, detached
from toolkit.launch.folder import write
from toolkit.launch.locks import is_held
from toolkit.launch.states import State
from toolkit.sweep.folder import SweepFolder

CANCELLED_S = 90.0
"""How long a cancellation may take: that of the chains, and a driver that has to be started for it."""
LOOK_S = 0.3

_started: dict[str, subprocess.Popen[bytes]] = {}
"""Drivers that this process started, by sweep."""


def ensure(folder: SweepFolder) -> None:
    """Start a driver unless one runs, nothing is left to do, or the sweep is another machine's.

    It survives this process and its terminal.

    Raises:
        BackendError: The one that this process started ended without a word.
    """
    before = _started.get(folder.id)
    code = before.poll() if before else None  # collects it too
    ours = folder.asked["host"] == causes.host()  # locks may not reach from there to here
    if not ours or folder.result or folder.stopped or is_held(folder.lock):
        return
    if code is not None and code > 0 and code != errors.Interrupted.exit_code:
        raise errors.BackendError(
            f"the driver of {folder.id} ended with {code}",
            f"look into {folder.path / 'driver.log'}",
        )
    there = Path(folder.asked["cwd"])  # a relative tracking.uri starts there
    _started[folder.id] = detached.start(
        "toolkit.sweep.driver",
        folder.path,
        code=resources.PACKAGE.parent,
        cwd=there if there.is_dir() else folder.path,
        log=folder.path / "driver.log",
    )


def go_on(folder: SweepFolder) -> None:
    """Drive it, also where an earlier driver gave up."""
    (folder.path / "stopped.json").unlink(missing_ok=True)
    ensure(folder)


def cancel(folder: SweepFolder, waits: Callable[[str], None] = lambda _: None) -> bool:
    """End a sweep with all of its chains; whether it is over. Safe to repeat.

    Args:
        folder: The sweep.
        waits: Told what is waited for.
    """
    if folder.result:
        return True
    write(folder.path / "cancelled.json", {"at": time.time()})
    deadline = time.monotonic() + CANCELLED_S
    go_on(folder)
    while folder.result is None and folder.stopped is None and time.monotonic() < deadline:
        ensure(folder)
        waits("waits for the trials' jobs")
        time.sleep(LOOK_S)
    return folder.result is not None


def retry(folder: SweepFolder) -> list[int]:
    """Start again what failed or was cancelled of a sweep that is over; what succeeded stays. Numbers of the trials.

    Raises:
        errors.UsageError: It is not over, or nothing failed.
    """
    if folder.result is None:
        raise errors.UsageError(f"{folder.id} is not over", f"toolkit sweeps cancel {folder.id}")
    again = [one for one in folder.trials if one.state is not State.succeeded]
    unasked = folder.cancelled and folder.section.method == "optuna"
    if not again and not unasked:
        raise errors.UsageError(
            f"all trials of {folder.id} succeeded", "there is nothing to do again"
        )
    for one in again:
        folder.keep(replace(one, state=State.queued, reason=None, value=None, ended=None))
    (folder.path / "cancelled.json").unlink(missing_ok=True)
    (folder.path / "result.json").replace(folder.path / "before.json")
    go_on(folder)
    return [one.number for one in again]
