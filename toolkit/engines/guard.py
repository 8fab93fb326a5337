"""The guard: a tiny process between the toolkit and an engine, so that nothing outlives what it was started for.

``python -I -S guard.py OPTIONS -- ENGINE...``, in a session of its own; it imports the standard
library only. The kernel gives it every orphan among its descendants (a child subreaper), so one walk
of the process tree finds all of them, whatever sessions and groups they made. It ends them all when

- the toolkit dies: its end of the pipe on standard input closes (unless it wrote ``d`` first, for *detached*);
- SIGTERM or SIGINT comes: the engine gets ``--grace`` seconds to finish running requests;
- the engine's first process ends: what it started goes too.

If the guard itself is killed, the kernel kills the engine's first process (``PR_SET_PDEATHSIG``);
the rest is known by its session and by a mark in its environment, and
:func:`toolkit.engines.orphans.reap` ends it by the record that the guard left in ``--records``.
Exit code: the engine's, 128 + n for signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
HURRIED_S = 3.0
"""What a process gets between SIGTERM and SIGKILL when nobody waits for its answer any more."""
MARK = "TOOLKIT_GUARD"

_libc = ctypes.CDLL(None, use_errno=True)


def processes() -> list[int]:
    """Ids of all processes that this one can see."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def stat_fields(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the third on (state, ppid, ...): the second may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot, or ``None``: with the id it names a process for good."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def mark() -> str:
    """The value of ``TOOLKIT_GUARD`` for children of this process: its PID namespace, id and start time."""
    return f"{Path('/proc/self/ns/pid').readlink()} {os.getpid()} {start_time(os.getpid())}"


def descendants(root: int) -> set[int]:
    """Living processes below ``root``."""
    parents: dict[int, int] = {}
    for pid in processes():
        with contextlib.suppress(OSError):
            fields = stat_fields(pid)
            if fields[0] not in "ZX":
                parents[pid] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def send(pids: set[int], number: int) -> None:
    """Signal each process that still lives."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def become_subreaper() -> None:
    """Have orphans below this process come to it, not to process 1."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_children() -> None:
    """Collect every ended child, ours or inherited, without waiting."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_all(grace_s: float) -> None:
    """SIGTERM to every descendant, SIGKILL after ``grace_s`` until none is left."""
    send(descendants(os.getpid()), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while left := descendants(os.getpid()):
        if time.monotonic() > deadline:
            send(left, signal.SIGKILL)
        time.sleep(0.05)
        reap_children()
    with contextlib.suppress(ChildProcessError):
        while True:  # all are dead; collect them, for in a container process 1 may not
            os.waitpid(-1, 0)


class Guard:
    """Starts one engine and outlives it by a moment."""

    def __init__(self, argv: list[str], grace_s: float, records: Path) -> None:
        self._argv = argv
        self._record = records / f"{os.getpid()}.json"
        self._grace_s = grace_s
        self._asked: float | None = None  # when SIGTERM came
        self._detached = False
        self._wake, write = os.pipe()
        for end in (self._wake, write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = self._asked or time.monotonic()

    def run(self) -> int:
        """Watch until the engine has ended or must; leave nothing behind; return the exit code."""
        become_subreaper()
        self._record.write_text(
            json.dumps({"mark": mark(), "python": os.path.realpath(self._argv[0])})
        )
        engine = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            env=os.environ | {MARK: mark()},
            preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 - one thread, nothing imported after the fork
        )
        code = self._watch(engine.pid)
        end_all(HURRIED_S)
        self._record.unlink(missing_ok=True)
        return 128 + signal.SIGTERM if code is None else code

    def _watch(self, pid: int) -> int | None:
        """The engine's exit code, or ``None`` when it is to be ended."""
        told = False
        while True:
            with contextlib.suppress(ChildProcessError):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    return code if code >= 0 else 128 - code
            reap_others(pid)
            if self._asked and not told:
                told = True
                send(
                    {pid}, signal.SIGTERM
                )  # the first process alone: it drains, then stops its own
            if self._asked and time.monotonic() - self._asked > self._grace_s:
                return None
            if self._toolkit_is_gone():
                return None

    def _toolkit_is_gone(self) -> bool:
        watched = [self._wake] if self._detached else [self._wake, 0]
        ready, _, _ = select.select(watched, [], [], 0.5)
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
        if 0 not in ready:
            return False
        said = os.read(0, 1)
        self._detached = said == b"d"
        return said == b""


def reap_others(pid: int) -> None:
    """Collect ended orphans that came to us, but not ``pid``."""
    with contextlib.suppress(ChildProcessError):
        while info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if info.si_pid == pid:
                return
            os.waitpid(info.si_pid, os.WNOHANG)


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """For ``preexec_fn`` of a process with one thread: the kernel sends ``number`` when ``parent`` dies."""

    def before_exec() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return before_exec


def main() -> int:
    """Read the command line and guard."""
    parser = argparse.ArgumentParser(description="start a program and end it with its starter")
    parser.add_argument(
        "--grace", type=float, default=20.0, help="seconds between SIGTERM and SIGKILL"
    )
    parser.add_argument(
        "--records", type=Path, required=True, help="existing folder for this guard's record"
    )
    parser.add_argument("argv", nargs="+")
    given = parser.parse_args()
    return Guard(given.argv, given.grace, given.records).run()


if __name__ == "__main__":
    sys.exit(main())
