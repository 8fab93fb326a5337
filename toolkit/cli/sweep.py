"""``toolkit sweep``: the recipe with other values, again and again."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render, sweep_tables
from toolkit.cli.options import json_option, recipe_argument, set_option, workspace_option

if TYPE_CHECKING:
    from toolkit.sweep.draft import Draft
    from toolkit.sweep.folder import SweepFolder

LOOK_S = 0.5
ASK_S = 5.0
"""How often the driver is looked after."""


@click.command()
@recipe_argument
@set_option
@click.option(
    "--on",
    "on",
    metavar="NAME",
    default="local",
    show_default=True,
    help="Where its jobs run: a profile's name or file.",
)
@click.option("--detach", is_flag=True, help="Come back at once; `toolkit sweeps` shows it.")
@click.option("--dry-run", is_flag=True, help="Check and list the trials, and stop.")
@workspace_option
@json_option
def sweep(
    recipe: Path,
    *,
    overrides: tuple[str, ...],
    on: str,
    detach: bool,
    dry_run: bool,
    workspace: Path | None,
    as_json: bool,
) -> None:
    """Run a recipe with the values of its section `sweep`, each trial a chain of jobs, and mark the best.

    The same command again goes on where it was, and starts nothing twice; once it is over it shows the
    result. Exit code 1 when every trial failed.

    \b
    Examples:
      toolkit sweep my.yaml --dry-run
      toolkit sweep my.yaml --set 'sweep.over.train.lora.rank=[8, 16, 32]'
      toolkit sweep my.yaml --on slurm --detach
    """
    from toolkit import tracking
    from toolkit.sweep import orders
    from toolkit.sweep.draft import draft
    from toolkit.tracking import Store

    made = draft(recipe, overrides, on, workspace)
    if dry_run:
        _show_draft(made, as_json=as_json)
        return
    folder = made.folder
    if folder.result is None:
        tracking.check(Store.read(made.store))
        folder = made.write()
        orders.go_on(folder)
    if not detach:
        _follow(folder, quiet=as_json)
        sys.exit(sweep_tables.closing(folder, as_json=as_json))
    if as_json:
        render.as_json(sweep_tables.summary(folder))
        return
    render.say(folder.id)
    render.hint(f"how it goes:  toolkit sweeps show {folder.id}{sweep_tables.where(folder)}")


def _show_draft(made: Draft, *, as_json: bool) -> None:
    rows = [
        (values, [one.step.name for one in statuses if not one.done])
        for values, _, statuses in made.trials
    ]
    known = made.section.method != "optuna"
    count = len(rows) if known else made.section.trials
    if as_json:
        trials = [{"values": values, "steps": steps} for values, steps in rows]
        target = {"step": made.step, "metric": made.metric, "goal": made.goal}
        render.as_json(
            {"sweep": made.id, **target, "count": count, "known": known, "trials": trials}
        )
        return
    columns = ("trial", *made.section.over, "steps to run")
    table: list[tuple[Any, ...]] = [
        (
            number if known else None,
            *(sweep_tables.cell(value) for value in values.values()),
            f"{len(steps)}: {', '.join(steps)}" if steps else "none: all done",
        )
        for number, (values, steps) in enumerate(rows, 1)
    ]
    render.table(columns, table)
    if not known:
        render.say(
            f"optuna chooses {count} trials, each from what the ones before it measured: above are only the "
            "ends of what it may choose, which were checked"
        )
    render.say(
        f"{made.id}: {count} trials, {made.section.parallel} at once, to {made.goal} {made.metric} of "
        f"{made.step}; steps that trials share run once"
    )


def _follow(folder: SweepFolder, *, quiet: bool) -> None:
    """Show what changes until it is over, or its driver gave up."""
    from toolkit.sweep import orders

    shown: dict[int, str] = {}
    looked = -ASK_S
    try:
        while folder.result is None and folder.stopped is None:
            if time.monotonic() - looked >= ASK_S:
                orders.ensure(folder)
                looked = time.monotonic()
            if not quiet:
                sweep_tables.changes(folder, shown)
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        _leave_or_cancel(folder)
        raise
    if not quiet:
        sweep_tables.changes(folder, shown)


def _leave_or_cancel(folder: SweepFolder) -> None:
    """After Ctrl-C: it goes on unless somebody who can be asked says otherwise."""
    from toolkit.sweep import orders

    try:
        wanted = sys.stdin.isatty() and click.confirm(
            "\ncancel the sweep too?", default=False, err=True
        )
    except click.Abort:
        wanted = False
    if wanted:
        orders.cancel(folder, render.ProgressLine("cancel").update)
        return
    where = sweep_tables.where(folder)
    render.hint(f"the sweep goes on:  toolkit sweeps show {folder.id}{where}")
    render.hint(f"to end it:          toolkit sweeps cancel {folder.id}{where}")
