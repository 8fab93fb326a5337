"""``toolkit sweeps``: what ``toolkit sweep`` started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.cli import render, sweep_tables
from toolkit.cli.options import json_option, workspace_option

if TYPE_CHECKING:
    from toolkit.sweep.folder import SweepFolder

name_argument = click.argument("name", metavar="[ID]", required=False)


@click.group()
def sweeps() -> None:
    """Look at, end and repeat sweeps. ID is a sweep or its beginning; the newest one unless given.

    \b
    Example:
      toolkit sweeps list
    """


@sweeps.command("list")
@workspace_option
@json_option
def list_sweeps(workspace: Path | None, as_json: bool) -> None:
    """List sweeps, the newest first.

    \b
    Example:
      toolkit sweeps list
    """
    from toolkit.sweep import folder, orders

    found = folder.sweeps(_root(workspace))
    for one in found:
        orders.ensure(one)
    if as_json:
        render.as_json([sweep_tables.summary(one) for one in found])
    elif not found:
        render.say("no sweeps: toolkit sweep RECIPE starts one")
    else:
        columns = ("sweep", "state", "trials", "metric", "best")
        render.table(columns, [_row(one) for one in reversed(found)])


@sweeps.command("show")
@name_argument
@workspace_option
@json_option
def show_sweep(name: str | None, workspace: Path | None, as_json: bool) -> None:
    """Show the trials of a sweep with what they measured, and the best up to now.

    \b
    Example:
      toolkit sweeps show tickets-sweep-3fa2c1d4
    """
    from toolkit.sweep import orders

    found = _find(workspace, name)
    orders.ensure(found)
    if as_json:
        render.as_json(sweep_tables.summary(found))
    else:
        sweep_tables.show(found)


@sweeps.command("cancel")
@click.argument("name", metavar="ID")
@workspace_option
def cancel_sweep(name: str, workspace: Path | None) -> None:
    """End a sweep with all jobs of its trials; what is done stays. Can be repeated.

    \b
    Example:
      toolkit sweeps cancel tickets-sweep-3fa2c1d4
    """
    from toolkit.errors import BackendError
    from toolkit.sweep import orders

    found = _find(workspace, name)
    if not orders.cancel(found, render.ProgressLine("cancel").update):
        said = (found.stopped or {}).get("message", "its jobs are not gone yet")
        raise BackendError(f"{found.id}: {said}", "run the same command again")
    sweep_tables.show(found)


@sweeps.command("retry")
@click.argument("name", metavar="ID")
@workspace_option
def retry_sweep(name: str, workspace: Path | None) -> None:
    """Start again the trials that failed or were cancelled of a sweep that is over.

    \b
    Example:
      toolkit sweeps retry tickets-sweep-3fa2c1d4
    """
    from toolkit.sweep import orders

    found = _find(workspace, name)
    again = orders.retry(found)
    render.say(f"{found.id}: {', '.join(f'trial {number}' for number in again)}")


def _root(workspace: Path | None) -> Path:
    from toolkit.workspace import Workspace

    return Workspace.locate(workspace).sweeps


def _find(workspace: Path | None, name: str | None) -> SweepFolder:
    from toolkit.sweep import folder

    return folder.find(_root(workspace), name)


def _row(one: SweepFolder) -> tuple[str, str, str, str, str | None]:
    trials, asked = one.trials, one.asked
    best = one.best(trials)
    over = sum(trial.state.ended for trial in trials)
    shown = f"{best.value:.6g} (trial {best.number})" if best else None
    return (
        one.id,
        sweep_tables.state(one),
        f"{over} of {sweep_tables.count(one)}",
        asked["metric"],
        shown,
    )
