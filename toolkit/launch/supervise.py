"""One attempt of a job at an engine that keeps no order: handed over unless it runs, and watched to its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import BackendError, NoPlaceError
from toolkit.launch import keeper_process
from toolkit.launch.backend import Backend
from toolkit.launch.folder import Attempt, JobFolder, write
from toolkit.launch.local import Local
from toolkit.launch.retries import again
from toolkit.launch.states import Cause, Seen, State

LOOK_S = 0.2
"""How often a job's folder is looked at."""
ASK_S = 3.0
"""How often an engine is asked about all its jobs."""
TRIES_S = 60.0
"""Longest pause between two tries at an engine that does not answer."""
KILL_S = 26.0
"""After a cancellation on this machine: from then on processes are killed, wherever they went."""


class Supervisor:
    """Sees jobs of one engine through; many at once, in one event loop."""

    def __init__(self, backend: Backend, jobs: Path) -> None:
        self._backend = backend
        self._jobs = jobs
        self._turns = {True: asyncio.Lock(), False: asyncio.Lock()}
        self._asked: dict[str, Seen] = {}
        self._asked_at = 0.0
        self._watched: set[str] = set()

    async def supervise(self, job: JobFolder) -> str:
        """See one attempt to its end: ``again`` or ``over``."""
        await self._settled(job)
        spec, attempts = job.spec, job.attempts
        begun = bool(attempts) and attempts[-1].ended is None
        if self._finished(job) or not (self._runs(job) or await self._hand_over(job)):
            keeper_process.mark(job.path.parent)
            return "over"
        await self._watch(job, len(attempts) - 1 if begun and self._runs(job) else len(attempts))
        ends = job.ends
        verdict = "again" if ends and not job.cancelled and again(spec, ends) else "over"
        if verdict == "over":
            keeper_process.mark(job.path.parent)
        return verdict

    async def _settled(self, job: JobFolder) -> None:
        """On this machine: wait while a shim that wrote its last word ends, or a new one has not begun yet.

        Both hold the job's lock beside an attempt that ended: only time tells which it is.
        """
        if not isinstance(self._backend, Local):
            return
        deadline = time.monotonic() + KILL_S
        while self._backend.lives(job.spec):
            attempts = job.attempts
            if not attempts or attempts[-1].ended is None:
                return
            if time.monotonic() > deadline:  # what the shim left behind
                self._backend.end_all(job.spec)
            await asyncio.sleep(LOOK_S / 4)

    def _finished(self, job: JobFolder) -> bool:
        """Whether it succeeded, failed for good, or is not wanted any more."""
        if job.cancelled and not self._runs(job):
            return True
        attempts = job.attempts[job.retried["before"] :]
        return (
            bool(attempts)
            and not self._runs(job)
            and bool(attempts[-1].ended and not again(job.spec, job.ends))
        )

    def _runs(self, job: JobFolder) -> bool:
        """Whether an attempt is under way: on this machine the kernel knows, elsewhere the folder and the engine."""
        if isinstance(self._backend, Local):
            return self._backend.lives(job.spec)
        attempts = job.attempts[job.retried["before"] :]
        if job.submitted is None:
            return False
        return not attempts or attempts[-1].ended is None

    async def _hand_over(self, job: JobFolder) -> bool:
        """Give it to the engine as soon as that takes it; False when it is cancelled before, or can never be."""
        spec, pause = job.spec, LOOK_S
        if isinstance(self._backend, Local) and job.attempts:
            self._backend.end_all(spec)  # what a dead attempt may have left
            job.close_lost()
        async with self._turns[spec.resources.gpus > 0]:  # who came first is served first
            text = self._backend.render(spec, {})  # before: once it began, the next start is named
            while not job.cancelled:
                try:
                    engine_id = await asyncio.to_thread(self._backend.submit, spec, {})
                except NoPlaceError as error:
                    _note(job, str(error))
                    pause = LOOK_S
                except BackendError as error:
                    if isinstance(self._backend, Local):
                        write_off(job, error.message, Cause.usage, error.hint)
                        return False
                    _note(job, str(error))
                    pause = min(TRIES_S, pause * 2)
                else:
                    job.write("submitted.json", {"id": engine_id, "at": time.time(), "text": text})
                    return True
                await asyncio.sleep(pause)
        return False

    async def _watch(self, job: JobFolder, before: int) -> None:
        """Wait until the attempt after ``before`` earlier ones ended, by its word or because it is lost."""
        told = time.monotonic()
        while True:
            attempts = job.attempts
            mine = attempts[before] if len(attempts) > before else None
            if mine and mine.ended:
                return
            if isinstance(self._backend, Local):
                if not self._backend.lives(job.spec) and self._is_gone(job, before):
                    return
                self._backend.reap()
                if job.cancelled and time.time() - job.cancelled["at"] > KILL_S:
                    self._backend.end_all(job.spec)
            elif time.monotonic() - told > ASK_S:
                told = time.monotonic()
                if await self._lost_elsewhere(job, mine):
                    return
            await asyncio.sleep(LOOK_S)

    def _is_gone(self, job: JobFolder, before: int) -> bool:
        """On this machine: nobody holds the job's lock. Write down how that attempt ended if it did not say."""
        attempts = job.attempts
        if len(attempts) > before:
            if attempts[before].ended is None:
                job.close_lost()
            return True
        if job.cancelled:
            return True
        text = (job.path / "start.log").read_text(errors="replace").strip()
        said = text.splitlines()[-1] if text else "it ended before it began"
        write_off(job, f"it did not begin: {said}")
        return True

    async def _lost_elsewhere(self, job: JobFolder, mine: Attempt | None) -> bool:
        submitted = job.submitted
        if submitted is None:
            return True
        seen = (await self._ask(str(submitted["id"]))).get(str(submitted["id"]))
        over = seen is not None and (seen.state.ended or seen.cause is not None)
        if mine is None:
            if seen is None or not over:
                if (
                    seen and seen.state is State.retrying
                ):  # the engine would not wait longer for a place
                    await self._hand_over_again(job)
                return False
            try:  # where it is our patience that ended, it could begin yet
                await asyncio.to_thread(self._backend.cancel, [str(submitted["id"])])
            except BackendError:
                return False
            found = Cause.failed if seen.cause in (None, Cause.done) else seen.cause
            write_off(job, f"it did not begin: {seen.reason or seen.word}", found)
            return True
        if mine.is_silent(left=over):
            if not over:
                await asyncio.to_thread(self._backend.cancel, [str(submitted["id"])])
            write(mine.folder / "ended.json", job.lost(mine) | _told(seen))
            return True
        return False

    async def _hand_over_again(self, job: JobFolder) -> None:
        with contextlib.suppress(BackendError):  # then the next time
            await asyncio.to_thread(self._backend.submit, job.spec, {})

    async def _ask(self, engine_id: str) -> Mapping[str, Seen]:
        """What the engine says: one call for all jobs, at most every ASK_S."""
        self._watched.add(engine_id)
        if time.monotonic() - self._asked_at >= ASK_S:
            self._asked_at = time.monotonic()
            try:
                self._asked = dict(
                    await asyncio.to_thread(self._backend.seen, sorted(self._watched))
                )
            except BackendError:
                self._asked = {}  # not there just now; heartbeats tell meanwhile
        return self._asked


def _told(seen: Seen | None) -> dict[str, Any]:
    """What the engine knows of an end that the job itself could not tell: it was killed for its memory, say."""
    if seen is None or seen.cause in (None, Cause.done, Cause.preempted):
        return {}
    message = f"{seen.word}: {seen.reason}" if seen.reason else f"the engine says {seen.word}"
    return {"cause": seen.cause.value, "exit_code": seen.exit_code, "message": message}


def _note(job: JobFolder, reason: str) -> None:
    write(job.path / "waiting.json", {"reason": reason, "at": time.time()})


def write_off(
    job: JobFolder, why: str, cause: Cause = Cause.failed, hint: str | None = None
) -> None:
    """Write down the end of a start that never began."""
    end = {"at": time.time(), "exit_code": None, "cause": cause.value, "kept": False}
    said = {"message": why, "hint": hint, "again": False}
    write(job.next_attempt().folder / "ended.json", end | said)
