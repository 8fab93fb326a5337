"""The end of a chain: its MLflow run gets the status that its jobs give it, whoever sees it first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.launch import costs, report
from toolkit.launch.folder import JobFolder, read, write
from toolkit.launch.locks import hold, let_go
from toolkit.launch.report import JobReport
from toolkit.launch.states import State

STATUS = {State.succeeded: "FINISHED", State.failed: "FAILED", State.cancelled: "KILLED"}


def settle(folder: Path) -> str | None:
    """End the MLflow runs of a chain that is over; its status, or ``None`` while it is not.

    Does nothing the second time.
    """
    chain = read(folder / "chain.json") or {}
    done = read(folder / "settled.json")
    if done:
        return str(done["status"])
    reports = report.of_chain(folder.parent, chain)
    if not all(one.state.ended for one in reports):
        return None
    lock = hold(folder / "settle.lock")
    if lock is None:  # somebody else is at it
        return STATUS[report.state_of(reports)]
    try:
        return _settle(folder, chain, reports)
    finally:
        let_go(lock)


def reopen(folder: Path) -> None:
    """Undo :func:`settle`, because jobs of the chain are started again: its MLflow run runs."""
    from toolkit.launch.in_job import parent_run

    if (read(folder / "parent.json") or {}).get("parent_run"):
        parent_run(read(folder / "chain.json") or {}).leave()
    (folder / "settled.json").unlink(missing_ok=True)


def _settle(folder: Path, chain: Mapping[str, Any], reports: Sequence[JobReport]) -> str:
    status = STATUS[report.state_of(reports)]
    if (read(folder / "parent.json") or {}).get("parent_run"):
        for one in reports:
            if _left_open(one):
                _end_child(chain, one, folder)
        _end_parent(folder, chain, reports, status)
    write(folder / "settled.json", {"status": status})
    return status


def _left_open(one: JobReport) -> bool:
    """Whether the job's own MLflow run waits for an attempt that will not come."""
    ends = JobFolder(Path(one.folder)).ends
    return (
        bool(ends)
        and one.state is not State.succeeded
        and ends[-1]["cause"] in ("preempted", "lost")
    )


def _end_child(chain: Mapping[str, Any], one: JobReport, folder: Path) -> None:
    from toolkit.tracking.run import RecipeRun
    from toolkit.tracking.store import Store

    store = Store.read(chain["store"])
    run = RecipeRun.again(store, chain["experiment"], one.step, one.id)
    parent = (read(folder / "parent.json") or {})["parent_run"]
    run.tag({"mlflow.parentRunId": parent, "toolkit.error": one.reason or ""})
    run.end(STATUS[one.state])


def _end_parent(
    folder: Path, chain: Mapping[str, Any], reports: Sequence[JobReport], status: str
) -> None:
    from toolkit.launch.in_job import parent_run

    run = parent_run(chain)
    run.log(0, {"gpu_hours": costs.of_chain(folder)})
    why = next((one for one in reports if one.state in (State.failed, State.cancelled)), None)
    if why:
        run.tag({"toolkit.error": f"{why.step}: {why.reason}"[:5000]})
    run.end(status)
