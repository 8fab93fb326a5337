"""``run --on``: submit, follow, and come back with the chain's exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import outcome as outcomes
from toolkit.cli import render

if TYPE_CHECKING:
    from toolkit.launch.chain import Draft, How
    from toolkit.prepare import Prepared
    from toolkit.survey import StepStatus


def run_on(
    prepared: Prepared,
    statuses: Sequence[StepStatus],
    how: How,
    *,
    detach: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Submit what is not done, and follow it to its end unless ``detach``."""
    from toolkit import execute
    from toolkit.between import Course
    from toolkit.launch.chain import draft
    from toolkit.launch.submit import submit

    if all(status.done for status in statuses):
        outcome = execute.nothing_to_do(Course.of(prepared, frozen=how.frozen), statuses)
        outcomes.report(outcome, prepared, as_json=as_json)
        return
    if dry_run:
        _show_draft(draft(prepared, statuses, how), as_json=as_json)
        return
    try:
        submitted = submit(prepared, statuses, how)
    except KeyboardInterrupt:
        render.hint("cut off while it was submitted: the same command goes on with it")
        render.hint("whether anything of it is there:  toolkit jobs list")
        raise
    jobs = submitted.folder.parent
    if not detach:
        _follow(submitted.id, jobs, prepared, as_json=as_json)
        return
    if as_json:
        from toolkit.cli.jobs import reports_of

        render.as_json(
            {"chain": submitted.id, "jobs": [asdict(r) for r in reports_of(jobs, submitted.id)]}
        )
        return
    render.say(submitted.id)
    if submitted.before:
        render.hint("it was submitted before and is not over: nothing new was started")
    render.hint(f"how it goes:  toolkit jobs show {submitted.id}{_where(jobs)}")


def _show_draft(made: Draft, *, as_json: bool) -> None:
    texts = list(made.rendered())
    if as_json:
        render.as_json(
            [{"job": job.id, "after": list(job.after), "text": text} for job, text in texts]
        )
        return
    for job, text in texts:
        after = f", after {', '.join(job.after)}" if job.after else ""
        render.hint(f"# {job.id}{after}")
        render.say(text.removesuffix("\n"))


def _follow(name: str, jobs: Path, prepared: Prepared, *, as_json: bool) -> None:
    from toolkit.cli.following import follow
    from toolkit.execute import outcome_of
    from toolkit.launch.folder import read

    try:
        reports = follow(jobs, name)
    except KeyboardInterrupt:
        _leave_or_cancel(name, jobs)
        raise
    failed = next((one for one in reports if one.state != "succeeded"), None)
    if failed is None:
        parent = (read(jobs / name / "parent.json") or {}).get("parent_run")
        ours = {one.step for one in reports}
        cached = [step.name for step in prepared.plan.steps if step.name not in ours]
        outcomes.report(outcome_of(prepared, parent, cached), prepared, as_json=as_json)
        return
    if as_json:
        render.as_json({"chain": name, "jobs": [asdict(one) for one in reports]})
    sys.exit(_fail(failed, jobs))


def _fail(failed: Any, jobs: Path) -> int:
    """Say why a chain did not succeed; the exit code."""
    from toolkit.errors import StepFailedError

    said = f"{failed.step} {failed.state}: {failed.reason or failed.cause}"
    log = f"toolkit jobs logs {failed.id}{_where(jobs)}"
    render.error(StepFailedError(said, failed.hint or log))
    code = failed.exit_code or 1
    return code if 0 < code < 128 else 1


def _leave_or_cancel(name: str, jobs: Path) -> None:
    """After Ctrl-C: jobs go on unless somebody who can be asked says otherwise."""
    from toolkit.launch import actions

    try:
        wanted = sys.stdin.isatty() and click.confirm(
            "\ncancel the jobs too?", default=False, err=True
        )
    except click.Abort:
        wanted = False
    if wanted:
        actions.cancel(jobs, actions.find(jobs, [name]), render.hint)
        return
    render.hint(f"the jobs go on:  toolkit jobs wait {name}{_where(jobs)}")
    render.hint(f"to end them:     toolkit jobs cancel {name}{_where(jobs)}")


def _where(jobs: Path) -> str:
    """The option that finds the workspace again, where it is not the default one."""
    from toolkit.workspace import Workspace

    root = jobs.parent
    return "" if Workspace.locate().root == root else f" --workspace {root}"
