"""The program that every engine starts on every node: ``python -P -m toolkit.launch.shim JOBFOLDER``.

It makes the folder of the attempt, starts the worker as its child, keeps its output in ``log.txt`` and passes it on
to the engine's own log, beats, passes SIGTERM and SIGUSR1 on as SIGTERM, and says at the end why it ended. Light on
purpose: the standard library and a few small files of ours.

Exit codes: 0 done; 75 start it again (``ended.json`` says whether something is kept); else the worker's own.

Variables that engines set: ``TOOLKIT_NODE`` (0, 1, ...) where there are several nodes; ``TOOLKIT_START``, any text
that is equal on all nodes of one start and on no others, so that they find one attempt; ``TOOLKIT_ENGINE_ID``.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from toolkit.engines.guard import (
    become_subreaper,
    descendants,
    die_with_parent,
    reap_others,
    send,
    start_time,
)
from toolkit.launch import causes, ending
from toolkit.launch.ending import Told
from toolkit.launch.folder import BEAT_S, Attempt, JobFolder, write
from toolkit.launch.locks import HELD, hold, inherited
from toolkit.launch.retries import again

CANCEL_S = 18.0
"""From the word of a cancellation to SIGKILL, seconds: all is gone within 30."""
LAST_WORDS_S = 5.0
"""What is left of the grace for writing down how it ended."""
LOOK_S = 0.5
"""How often it looks for a cancellation and at the clock."""
FIND_S = 120.0
"""How long another node waits for the first one to begin."""
SECOND_COPY = 4
"""Exit code of a copy that finds the job running."""


@dataclass
class Shim:
    """One start of one job on one node."""

    job: JobFolder
    node: int = 0
    told: Told = field(default_factory=Told)

    def run(self) -> int:
        """Run the job to its end; the exit code."""
        if self.node:
            attempt = self._find(os.environ.get("TOOLKIT_START"))
            return Watch(self, attempt).run() if attempt else 1
        if hold(self.job.lock) is None:
            sys.stderr.write("this job runs already: a second start does nothing\n")
            return SECOND_COPY
        if self.job.cancelled:
            return 128 + signal.SIGTERM
        self.job.close_lost()
        ends = self.job.ends
        if ends and not again(
            self.job.spec, ends
        ):  # an engine that starts jobs by rules of its own
            return ending.exit_code(ends[-1] | {"again": False})
        attempt, before = self.job.next_attempt(), causes.oom_kills()
        _begin(attempt)
        code = Watch(self, attempt).run()
        return self._end(attempt, code, causes.oom_kills() > before)

    def _find(self, start: str | None) -> Attempt | None:
        """On another node: the attempt that the first node began for the same start."""
        deadline = time.monotonic() + FIND_S
        while time.monotonic() < deadline and self.told.signal is None:
            for attempt in reversed(self.job.attempts):
                begun = attempt.started
                if begun and begun["start"] == start and attempt.ended is None:
                    return attempt
            time.sleep(LOOK_S)
        sys.stderr.write(f"node {self.node}: the first node did not begin in {FIND_S:g} s\n")
        return None

    def _end(self, attempt: Attempt, code: int, killed_by_kernel: bool) -> int:
        """Write why it ended; the exit code for the engine."""
        cause, message = ending.cause_of(self.job, attempt, self.told, code, killed_by_kernel)
        end = {
            "at": time.time(),
            "exit_code": code,
            "cause": cause.value,
            "message": message,
            "hint": (attempt.said or {}).get("hint"),
            "kept": self.job.kept_since((attempt.started or {})["at"]),
        }
        end["again"] = again(self.job.spec, [*self.job.ends[:-1], end])
        write(attempt.folder / "ended.json", end)
        return ending.exit_code(end)


@dataclass
class Watch:
    """Looks after the worker of one attempt from its start to its end."""

    shim: Shim
    attempt: Attempt
    beaten: float = 0.0
    looked: float = 0.0
    passed_on: bool = False
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.spec, self.told = self.shim.job.spec, self.shim.told

    def run(self) -> int:
        """Start the worker, keep its output, beat and obey until it ended; end whatever it left behind."""
        worker = self._start()
        with self.attempt.log(self.shim.node).open("ab", buffering=0) as log:
            open_ = True
            while worker.poll() is None:
                if open_:
                    open_ = _forward(worker.stdout, log, LOOK_S / 2)
                else:  # it closed its output, and runs
                    time.sleep(0.05)
                self._look(worker.pid)
            _end_rest(worker.pid)
            while open_ and _ready(worker.stdout, 0):
                open_ = _forward(worker.stdout, log, 0)
        return int(worker.wait())

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the worker in a group of its own; it holds the job's locks too, and SIGTERM comes if we die."""
        held = inherited()
        own = {"TOOLKIT_ATTEMPT": str(self.attempt.folder), HELD: ",".join(map(str, held))}
        own |= {
            "TOOLKIT_GRACE_S": str(self.spec.grace_s)
        }  # how long a stage may write a checkpoint
        return subprocess.Popen(
            self.shim.job.command,
            env=os.environ | own | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=held,
            preexec_fn=_before_worker(os.getpid()),  # noqa: PLW1509 - one thread
        )

    def _look(self, worker: int) -> None:
        now = time.monotonic()
        if self.shim.node == 0 and now - self.beaten >= BEAT_S:
            self.beaten = now
            self.attempt.beat()
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        if not self.told.cancelled and self.shim.job.cancelled:
            self.told.cancel(now)
        limit = self.spec.resources.time_limit_s
        if limit and now - self.began >= limit - self.spec.grace_s:
            self.told.note(signal.SIGUSR1, now, time_limit=True)
        self._obey(worker, now)

    def _obey(self, worker: int, now: float) -> None:
        if self.told.signal is None:
            return
        if not self.passed_on:
            self.passed_on = True
            _to_group(worker, signal.SIGTERM)
        grace = CANCEL_S if self.told.cancelled else max(1.0, self.spec.grace_s - LAST_WORDS_S)
        if now - self.told.at >= grace:
            _to_group(worker, signal.SIGKILL)


def _before_worker(shim: int) -> Callable[[], None]:
    """SIGTERM when the shim dies; SIGUSR1 is the shim's alone, though srun gives it to every process of a step."""
    told_of_death = die_with_parent(shim, signal.SIGTERM)

    def before_exec() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # kept by all that the worker starts
        told_of_death()

    return before_exec


def _begin(attempt: Attempt) -> None:
    attempt.beat()
    write(
        attempt.folder / "started.json",
        {
            "at": time.time(),
            "host": causes.host(),
            "pid": os.getpid(),
            "start_time": start_time(os.getpid()),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "engine_id": os.environ.get("TOOLKIT_ENGINE_ID"),
            "start": os.environ.get("TOOLKIT_START"),
        },
    )


def _ready(stream: IO[bytes] | None, timeout_s: float) -> bool:
    return stream is not None and bool(select.select([stream], [], [], timeout_s)[0])


def _forward(stream: IO[bytes] | None, log: IO[bytes], timeout_s: float) -> bool:
    """Move what the worker printed into the log and on to our own output; False at its end."""
    if stream is None or not _ready(stream, timeout_s):
        return stream is not None
    chunk = os.read(stream.fileno(), 1 << 16)
    for target in (log.fileno(), sys.__stdout__.fileno() if sys.__stdout__ else 1):
        with contextlib.suppress(OSError):  # a full disk or a closed terminal ends no job
            os.write(target, chunk)
    return bool(chunk)


def _to_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


def _end_rest(worker: int) -> None:
    """End what the worker left behind: it came to us, because we are its subreaper."""
    deadline = time.monotonic() + LAST_WORDS_S
    while left := descendants(os.getpid()) - {worker}:
        send(left, signal.SIGKILL)
        reap_others(worker)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def main(argv: list[str]) -> int:
    """Run the job whose folder is given."""
    become_subreaper()
    shim = Shim(JobFolder(Path(argv[0])), int(os.environ.get("TOOLKIT_NODE", "0")))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda told, _frame: shim.told.note(told, time.monotonic()))
    return shim.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
