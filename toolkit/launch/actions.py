"""What people order of jobs: find, cancel, try again."""

from __future__ import annotations

import getpass
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import UsageError
from toolkit.launch import keeper_process, report, secrets
from toolkit.launch.backend import BACKENDS, Backend, backend_of
from toolkit.launch.dispatch import give, hand_over
from toolkit.launch.folder import JobFolder, read
from toolkit.launch.report import JobReport
from toolkit.launch.settle import reopen, settle
from toolkit.launch.states import Cause, Seen, State
from toolkit.registry import close_match

CANCELLED_S = 30.0
"""How long a cancellation may take until every process of a job is gone."""
LOOK_S = 0.3


def look(jobs: Path, chains: Sequence[Mapping[str, Any]]) -> list[JobReport]:
    """Reports of all jobs of some chains; each engine is asked once.

    A job that an engine of order calls running, and that beats no more, is started again: only here is it known.
    """
    seen = _seen(jobs, chains)
    found = {chain["id"]: report.of_chain(jobs, chain, seen) for chain in chains}
    for chain in chains:
        _start_lost_again(jobs, chain, found[chain["id"]])
    return [one for chain in chains for one in found[chain["id"]]]


def _start_lost_again(jobs: Path, chain: Mapping[str, Any], reports: Sequence[JobReport]) -> None:
    lost = [one for one in reports if (one.state, one.cause) == (State.retrying, Cause.lost)]
    if not lost or not BACKENDS[chain["backend"]].ordered:
        return  # else the keeper does it
    backend = backend_of(chain["backend"], chain["options"], jobs)
    ids = {one.id: one.engine_id for one in reports if one.engine_id}
    for one in lost:
        give(JobFolder(Path(one.folder)), backend, ids)


def _seen(jobs: Path, chains: Sequence[Mapping[str, Any]]) -> dict[str, Seen]:
    """What engines say of the jobs that have not ended by their folders; one call for each engine and section."""
    asked: dict[str, tuple[Backend, list[str]]] = {}
    for chain in chains:
        if chain["backend"] == "local" or read(jobs / chain["id"] / "settled.json"):
            continue  # the folder says all
        backend = backend_of(chain["backend"], chain["options"], jobs)
        _, ids = asked.setdefault(f"{chain['backend']} {chain['options']}", (backend, []))
        submitted = (JobFolder(jobs / chain["id"] / name).submitted for name in chain["jobs"])
        ids += [str(one["id"]) for one in submitted if one]
    seen: dict[str, Seen] = {}
    for backend, ids in asked.values():
        seen |= backend.seen(ids) if ids else {}
    return seen


def find(jobs: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Job ids by chain, of what people name: a chain, a job, or the only one that begins so.

    Raises:
        UsageError: Nothing or several are named so.
    """
    known = {chain["id"]: list(chain["jobs"]) for chain in report.chains(jobs)}
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        chain, ids = _one(name, known, jobs)
        found[chain] += [one for one in ids if one not in found[chain]]
    return dict(found)


def _one(name: str, known: Mapping[str, list[str]], jobs: Path) -> tuple[str, list[str]]:
    if name in known:
        return name, known[name]
    of_job = [(chain, [job]) for chain, ids in known.items() for job in ids if job == name]
    begin = [(chain, ids) for chain, ids in known.items() if chain.startswith(name)]
    for found in (of_job, begin):
        if len(found) == 1:
            return found[0]
    if begin:
        raise UsageError(
            f"{name} may be {', '.join(chain for chain, _ in begin[:5])}", "say more of it"
        )
    raise UsageError(
        f"no chain and no job is named {name!r} in {jobs.parent}{close_match(name, known)}",
        "toolkit jobs list --all; --workspace looks into another one",
    )


def cancel(
    jobs: Path, wanted: Mapping[str, Sequence[str]], waits: Callable[[str], None] = lambda _: None
) -> list[JobReport]:
    """End jobs with all that they started, and mark their MLflow runs KILLED; safe to repeat.

    Args:
        jobs: The workspace's ``jobs`` folder.
        wanted: Job ids by chain.
        waits: Told what is waited for.
    """
    chains = [chain for chain in report.chains(jobs) if chain["id"] in wanted]
    for chain in chains:
        _order_end(jobs, chain, wanted[chain["id"]])
    deadline = time.monotonic() + CANCELLED_S
    while True:
        reports = look(jobs, chains)
        ids = {one for some in wanted.values() for one in some}
        left = [one for one in reports if one.id in ids and not one.state.ended]
        if not left or time.monotonic() > deadline:
            break
        waits(f"waits for {', '.join(one.id for one in left)}")
        time.sleep(LOOK_S)
    for chain in chains:
        settle(jobs / chain["id"])
    return look(jobs, chains)


def _order_end(jobs: Path, chain: Mapping[str, Any], names: Sequence[str]) -> None:
    """First the word on disk, which the shim and the keeper read; then the engine."""
    order = {"at": time.time(), "by": getpass.getuser()}
    engine_ids, ordered = [], False
    for one in look(jobs, [chain]):
        if one.id not in names or one.state.ended:
            continue
        folder = JobFolder(Path(one.folder))
        if folder.cancelled is None:
            folder.write("cancelled.json", order)
            ordered = True
        engine_ids += [one.engine_id] if one.engine_id else []
    if engine_ids:
        backend_of(chain["backend"], chain["options"], jobs).cancel(engine_ids)
    if ordered and report.needs_keeper(chain):
        keeper_process.ask(jobs / chain["id"])


def retry(jobs: Path, chain: Mapping[str, Any]) -> list[str]:
    """Start again what failed or was cancelled of a chain that is over; what succeeded stays. The ids of the jobs.

    Raises:
        UsageError: It is not over, nothing failed, or a secret would not reach the jobs.
        BackendError: The engine is not there, or refuses.
    """
    reports = look(jobs, [chain])
    if running := [one.id for one in reports if not one.state.ended]:
        raise UsageError(
            f"{chain['id']} is not over: {', '.join(running)}", f"toolkit jobs cancel {chain['id']}"
        )
    again = [one for one in reports if one.state is not State.succeeded]
    if not again:
        raise UsageError(f"all jobs of {chain['id']} succeeded", "there is nothing to do again")
    for one in again if chain["backend"] == "local" else ():
        secrets.check(JobFolder(Path(one.folder)).spec.secrets, jobs)
    for one in again:
        folder = JobFolder(Path(one.folder))
        number = int(folder.retried["round"]) + 1
        order = {"at": time.time(), "by": getpass.getuser(), "before": len(folder.attempts)}
        folder.write("retried.json", order | {"round": number})
        for name in ("cancelled.json", "submitted.json", "waiting.json"):
            (folder.path / name).unlink(missing_ok=True)
    reopen(jobs / chain["id"])
    hand_over(jobs / chain["id"])
    return [one.id for one in again]
