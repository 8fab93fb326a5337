"""``toolkit jobs``: what ``run --on`` submitted, on whatever engine it is."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import job_tables as tables
from toolkit.cli import render
from toolkit.cli.options import json_option, workspace_option

if TYPE_CHECKING:
    from toolkit.launch.report import JobReport

names_argument = click.argument("names", nargs=-1, required=True, metavar="NAME...")


@click.group()
def jobs() -> None:
    """Look at, follow, end and repeat the jobs of a workspace. NAME is a chain, its beginning, or a job.

    \b
    Example:
      toolkit jobs list
    """


@jobs.command("list")
@click.option("--all", "show_all", is_flag=True, help="Chains that ended more than a day ago too.")
@workspace_option
@json_option
def list_jobs(show_all: bool, workspace: Path | None, as_json: bool) -> None:
    """List jobs with their states, the newest chain first.

    \b
    Example:
      toolkit jobs list --json
    """
    root, chains = _chains(workspace)
    reports = _look(root, chains)
    if not show_all:
        reports = tables.recent(reports)
    if as_json:
        render.as_json([asdict(one) for one in reports])
    elif not reports:
        render.say("no jobs: toolkit run RECIPE --on PROFILE submits some")
    else:
        columns = ("job", "state", "tries", "time", "where", "reason")
        render.table(columns, [tables.row(one) for one in tables.newest_first(reports)])


@jobs.command("show")
@names_argument
@workspace_option
@json_option
def show_jobs(names: Sequence[str], workspace: Path | None, as_json: bool) -> None:
    """Show all that is known of jobs. States in our words and the engine's, attempts, causes, costs.

    \b
    Example:
      toolkit jobs show tickets-3fa2c1d4
    """
    root, chains = _chains(workspace, names)
    reports = _named(_look(root, chains), root, names)
    if as_json:
        render.as_json([tables.full(one) for one in reports])
        return
    for one in reports:
        tables.show_one(one)


@jobs.command("logs")
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Wait for more until the job is over.")
@workspace_option
@json_option
def show_logs(name: str, follow: bool, workspace: Path | None, as_json: bool) -> None:
    """Print what jobs printed, in all tries and on all nodes. Also while they wait or run, and after.

    \b
    Example:
      toolkit jobs logs -f tickets-3fa2c1d4
    """
    from toolkit.launch import actions, keeper_process, logs, report

    root, chains = _chains(workspace, [name])
    ids = actions.find(root, [name])
    for chain in chains:

        def tick(chain: dict[str, Any] = chain) -> None:
            if report.needs_keeper(chain):
                keeper_process.ensure(root)

        for line in logs.lines(root, chain, ids[chain["id"]], follow=follow, tick=tick):
            if as_json:
                render.say(tables.one_line_of_json(asdict(line)))
            else:
                render.say(f"[node {line.node}] {line.text}" if line.node else line.text)


@jobs.command("wait")
@names_argument
@click.option("--timeout", type=float, help="Seconds; then it ends with exit code 124.")
@workspace_option
@json_option
def wait_for(
    names: Sequence[str], timeout: float | None, workspace: Path | None, as_json: bool
) -> None:
    """Wait until chains are over. Exit code 0 when all succeeded, else that of the first that did not.

    \b
    Example:
      toolkit jobs wait tickets-3fa2c1d4 --timeout 3600
    """
    from toolkit.cli.following import follow

    root, chains = _chains(workspace, names)
    reports: list[JobReport] = []
    end = time.monotonic() + timeout if timeout is not None else None
    for chain in chains:
        left = None if end is None else max(0.0, end - time.monotonic())
        try:
            reports += follow(root, chain["id"], quiet=True, timeout_s=left)
        except TimeoutError:
            render.hint(f"{chain['id']} is not over after {timeout:g} s")
            sys.exit(124)
    tables.show_all(reports, as_json=as_json)
    sys.exit(tables.exit_code(reports))


@jobs.command("cancel")
@names_argument
@workspace_option
@json_option
def cancel_jobs(names: Sequence[str], workspace: Path | None, as_json: bool) -> None:
    """End jobs with everything they started. Takes 30 seconds at most; later jobs of a chain end too; can be repeated.

    \b
    Example:
      toolkit jobs cancel tickets-3fa2c1d4
    """
    from toolkit.errors import BackendError
    from toolkit.launch import actions

    root, _ = _chains(workspace)
    wanted = actions.find(root, names)
    line = render.ProgressLine("cancel")
    reports = actions.cancel(root, wanted, line.update)
    ids = {one for some in wanted.values() for one in some}
    tables.show_all([one for one in reports if one.id in ids], as_json=as_json)
    if left := [one.id for one in reports if one.id in ids and not one.state.ended]:
        raise BackendError(f"not gone yet: {', '.join(left)}", "run the same command again")


@jobs.command("retry")
@names_argument
@workspace_option
@json_option
def retry_jobs(names: Sequence[str], workspace: Path | None, as_json: bool) -> None:
    """Start again what failed or was cancelled. Of chains that are over; what succeeded is not done again.

    \b
    Example:
      toolkit jobs retry tickets-3fa2c1d4
    """
    from toolkit.launch import actions

    root, chains = _chains(workspace, names)
    again = {chain["id"]: actions.retry(root, chain) for chain in chains}
    if as_json:
        render.as_json(again)
        return
    for chain, ids in again.items():
        render.say(f"{chain}: {', '.join(ids)}")


@jobs.command("top")
@workspace_option
@json_option
def top(workspace: Path | None, as_json: bool) -> None:
    """Show what jobs cost. GPU-hours and hours by recipe and step, and what is used now.

    \b
    Example:
      toolkit jobs top
    """
    root, chains = _chains(workspace)
    reports = _look(root, chains)
    by: dict[tuple[str, str], list[JobReport]] = defaultdict(list)
    for one in reports:
        by[one.recipe, one.step].append(one)
    rows = [tables.cost(recipe, step, some) for (recipe, step), some in by.items()]
    rows.sort(key=lambda row: (-row["gpu_hours"], -row["hours"]))
    total = sum(row["gpu_hours"] for row in rows)
    if as_json:
        render.as_json(
            {"gpu_hours": total, "steps": rows, "jobs": [asdict(one) for one in reports]}
        )
        return
    columns = ("recipe", "step", "jobs", "tries", "running", "hours", "GPU-hours")
    render.table(columns, [tuple(tables.number(value) for value in row.values()) for row in rows])
    render.say(f"{total:.2f} GPU-hours in all; running now: {sum(row['running'] for row in rows)}")


def reports_of(root: Path, chain: str) -> list[JobReport]:
    """Reports of one chain."""
    from toolkit.launch import actions, report

    return actions.look(root, [one for one in report.chains(root) if one["id"] == chain])


def _chains(
    workspace: Path | None, names: Sequence[str] | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """The ``jobs`` folder and the chains meant; a keeper is started again when one is needed and gone."""
    from toolkit.launch import actions, keeper_process, report
    from toolkit.workspace import Workspace

    root = Workspace.locate(workspace).jobs
    chains = report.chains(root)
    if names is not None:
        wanted = actions.find(root, names)
        chains = [chain for chain in chains if chain["id"] in wanted]
    waits = (c for c in chains if not (root / c["id"] / "settled.json").exists())
    if any(report.needs_keeper(chain) for chain in waits):
        keeper_process.ensure(root)
    return root, chains


def _look(root: Path, chains: Sequence[dict[str, Any]]) -> list[JobReport]:
    """Reports, with the MLflow runs of chains that are over ended."""
    from toolkit.launch import actions
    from toolkit.launch.settle import settle

    reports = actions.look(root, chains)
    open_ = {one.chain for one in reports if not one.state.ended}
    for chain in chains:
        if chain["id"] not in open_:
            settle(root / chain["id"])
    return reports


def _named(reports: Sequence[JobReport], root: Path, names: Sequence[str]) -> list[JobReport]:
    from toolkit.launch import actions

    ids = {one for some in actions.find(root, names).values() for one in some}
    return [one for one in reports if one.id in ids]
