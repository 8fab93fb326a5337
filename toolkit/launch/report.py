"""How jobs are: what their folders say, merged with what the engine says, as one state each."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.launch import causes, costs, retries
from toolkit.launch.backend import BACKENDS
from toolkit.launch.folder import LOST_S, Attempt, JobFolder, read
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Cause, Seen, State

FORGOTTEN = "its engine forgot it while it waited, or somebody cancelled it there"
WAITS = "waits for its turn"
"""Of a job that the keeper has in its queue."""
NOT_GIVEN = (
    "its engine does not have it: repeat the submission, which goes on with it, or cancel it"
)
"""Of a job whose engine orders jobs itself, and refused it; or its submitter was killed, or is at it just now."""


@dataclass(frozen=True)
class JobReport:
    """One job, for people and scripts.

    Attributes:
        state: One of eight words, whatever engine has it.
        cause: Why its last attempt ended, if it did.
        reason: Why it waits, or ended as it did; the engine's words where it has some.
        word: The engine's own word for its state.
        at: When it was submitted, began first and ended last; seconds since 1970.
    """

    id: str
    chain: str
    recipe: str
    step: str
    stage: str
    profile: str
    backend: str
    state: State
    cause: str | None
    reason: str | None
    hint: str | None
    exit_code: int | None
    attempts: int
    host: str | None
    gpus: str | None
    engine_id: str | None
    word: str | None
    submitted: float | None
    started: float | None
    ended: float | None
    seconds: float
    gpu_hours: float
    folder: str


@dataclass(frozen=True)
class _Standing:
    """State of a job with what explains it."""

    state: State
    cause: str | None = None
    reason: str | None = None
    hint: str | None = None
    exit_code: int | None = None


def chains(jobs: Path) -> list[dict[str, Any]]:
    """``chain.json`` of every chain, the oldest first."""
    found = (read(path) for path in jobs.glob("[!.]*/chain.json"))
    return sorted((one for one in found if one), key=lambda one: (one["at"], one["id"]))


def of_chain(
    jobs: Path, chain: Mapping[str, Any], seen: Mapping[str, Seen] | None = None
) -> list[JobReport]:
    """Reports of a chain's jobs in order.

    Args:
        jobs: The workspace's ``jobs`` folder.
        chain: ``chain.json``.
        seen: What the engine says, by engine id; ``None`` where it was not asked.
    """
    reports: list[JobReport] = []
    for name in chain["jobs"]:
        folder = JobFolder(jobs / chain["id"] / name)
        before = {report.id: report for report in reports}
        reports.append(_report(chain, folder, before, seen))
    return reports


def is_over(folder: Path) -> bool:
    """Whether nothing of a chain will run any more, by its folder alone."""
    chain = read(folder / "chain.json")
    return bool(chain) and all(job.state.ended for job in of_chain(folder.parent, chain or {}))


def needs_keeper(chain: Mapping[str, Any]) -> bool:
    """Whether a keeper on this machine has to look after a chain."""
    return not BACKENDS[chain["backend"]].ordered and bool(chain["host"] == causes.host())


def state_of(reports: Iterable[JobReport]) -> State:
    """The state of a chain: what has to be known of it first."""
    states = [report.state for report in reports]
    if all(state is State.succeeded for state in states):
        return State.succeeded
    first = (State.failed, State.cancelled, State.running, State.starting, State.retrying)
    return next((state for state in (*first, State.preempted) if state in states), State.queued)


def _report(
    chain: Mapping[str, Any],
    folder: JobFolder,
    before: Mapping[str, JobReport],
    seen: Mapping[str, Seen] | None,
) -> JobReport:
    spec, submitted, attempts = folder.spec, folder.submitted, folder.attempts
    engine_id = (submitted or {}).get("id")
    engine = seen.get(engine_id) if seen and engine_id else None
    standing = _standing(folder, spec, attempts, engine)
    if engine is None and seen is not None and _forgotten(chain, standing, submitted, attempts):
        standing = _Standing(
            State.failed, Cause.lost, FORGOTTEN, f"toolkit jobs retry {chain['id']}"
        )
    if standing.state is State.queued and not standing.reason and submitted is None:
        ordered = BACKENDS[chain["backend"]].ordered
        standing = replace(standing, reason=NOT_GIVEN if ordered else WAITS)
    recent = attempts[folder.retried["before"] :]
    standing = _upstream(standing, spec, recent, before) or standing
    begun = attempts[-1].started if attempts else None
    ends = [attempt.ended for attempt in attempts]
    return JobReport(
        id=spec.id,
        chain=chain["id"],
        recipe=chain["recipe"],
        step=spec.step,
        stage=spec.stage,
        profile=chain["profile"],
        backend=chain["backend"],
        **vars(standing),
        attempts=len(attempts),
        host=(begun or {}).get("host") or (engine.host if engine else None),
        gpus=(begun or {}).get("gpus"),
        engine_id=engine_id,
        word=engine.word if engine else None,
        submitted=(submitted or {}).get("at"),
        started=((attempts[0].started or {}).get("at")) if attempts else None,
        ended=(ends[-1] or {}).get("at") if ends and standing.state.ended else None,
        seconds=sum(map(costs.seconds, attempts)),
        gpu_hours=costs.gpu_hours(folder),
        folder=str(folder.path),
    )


def _standing(
    folder: JobFolder, spec: JobSpec, attempts: Sequence[Attempt], engine: Seen | None
) -> _Standing:
    last = attempts[-1] if len(attempts) > folder.retried["before"] else None
    cancelled = folder.cancelled
    if last is None:
        return _not_begun(folder, cancelled, engine)
    end = last.ended
    if end is None:
        return _under_way(folder, spec, last, engine)
    return _ended(folder, spec, end, cancelled, engine)


def _forgotten(
    chain: Mapping[str, Any],
    standing: _Standing,
    submitted: Mapping[str, Any] | None,
    attempts: Sequence[Attempt],
) -> bool:
    """Whether an engine that had a job and should start it knows it no more."""
    waits = standing.state in (State.queued, State.preempted)
    if not (waits and submitted and BACKENDS[chain["backend"]].ordered):
        return False
    last = (attempts[-1].ended if attempts else None) or submitted
    return time.time() - float(last["at"]) > LOST_S


def _not_begun(
    folder: JobFolder, cancelled: Mapping[str, Any] | None, engine: Seen | None
) -> _Standing:
    if cancelled:
        return _Standing(State.cancelled, Cause.cancelled, f"cancelled by {cancelled['by']}")
    if engine and engine.state.ended and engine.state is not State.succeeded:
        cause = engine.cause or Cause.failed
        return _Standing(engine.state, cause, engine.reason, None, engine.exit_code)
    if engine:
        state = State.starting if engine.state is State.running else engine.state
        return _Standing(state, reason=engine.reason)
    waiting = read(folder.path / "waiting.json")
    return _Standing(State.queued, reason=(waiting or {}).get("reason"))


def _under_way(folder: JobFolder, spec: JobSpec, last: Attempt, engine: Seen | None) -> _Standing:
    """Begun and without an end: it runs, unless it stopped beating or the engine says that it is gone."""
    age = last.beat_age_s()
    left = engine is not None and (engine.state.ended or engine.state is State.preempted)
    if age is not None and not last.is_silent(left=left):
        if folder.cancelled:
            return _Standing(State.running, reason="being cancelled")
        return _Standing(State.running)
    if folder.cancelled:
        return _Standing(State.cancelled, Cause.cancelled, "cancelled; it ended without a word")
    return _after_loss(folder, spec, folder.lost(last), age or 0.0)


def _after_loss(folder: JobFolder, spec: JobSpec, end: Mapping[str, Any], age: float) -> _Standing:
    reason = f"no heartbeat for {age:.0f} s: its machine, or what watched it there, is gone"
    if retries.again(spec, [*folder.ends[:-1], end]):
        return _Standing(State.retrying, Cause.lost, reason)
    return _Standing(State.failed, Cause.lost, f"{reason}; no try is left")


def _ended(
    folder: JobFolder,
    spec: JobSpec,
    end: Mapping[str, Any],
    cancelled: Mapping[str, Any] | None,
    engine: Seen | None,
) -> _Standing:
    cause = Cause(end["cause"])
    told = (end.get("message"), end.get("hint"), end.get("exit_code"))
    if cause is Cause.done:
        return _Standing(State.succeeded, cause, None, None, 0)
    if cause is Cause.cancelled or (cancelled and cause.retried):
        by = f"cancelled by {cancelled['by']}" if cancelled else told[0]
        return _Standing(State.cancelled, Cause.cancelled, by, None, told[2])
    if retries.again(spec, folder.ends):
        return _between(cause, told, engine)
    if cause.retried:
        tries = len(folder.ends)
        return _Standing(State.failed, cause, f"{told[0]}; no try is left of {tries}", *told[1:])
    return _Standing(State.failed, cause, *told)


def _between(cause: Cause, told: tuple[Any, Any, Any], engine: Seen | None) -> _Standing:
    """Between two tries, unless the engine says that there will be no other."""
    if engine and engine.state in (State.failed, State.cancelled):
        said = f"{told[0]}; then {engine.reason or engine.word}"
        return _Standing(engine.state, cause, said, *told[1:])
    if engine and engine.state is State.starting:
        return _Standing(State.starting, cause, *told)
    state = State.preempted if cause is Cause.preempted else State.retrying
    return _Standing(state, cause, *told)


def _upstream(
    standing: _Standing,
    spec: JobSpec,
    attempts: Sequence[Attempt],
    before: Mapping[str, JobReport],
) -> _Standing | None:
    """A job that never ran and never will, because one that it needs did not succeed."""
    if attempts or standing.state is State.succeeded:
        return None
    for name in spec.after:
        needed = before.get(name)
        if needed and needed.state in (State.failed, State.cancelled):
            root = needed.reason if needed.cause == Cause.upstream else None
            why = textwrap.shorten(needed.reason or str(needed.cause), 120, placeholder=" …")
            said = root or f"{needed.step} {needed.state.value}: {why}"
            return _Standing(State.cancelled, Cause.upstream, said)
        if needed and standing.state is State.queued and needed.state is not State.succeeded:
            return _Standing(State.queued, reason=f"after {needed.step}")
    return None
