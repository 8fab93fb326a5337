"""``toolkit runs`` and ``toolkit ui``: what the tracking store knows."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, workspace_option
from toolkit.errors import TrackingError

if TYPE_CHECKING:
    from toolkit.tracking.history import RunSummary
    from toolkit.tracking.store import Store

KEY_METRICS = 3
"""Metrics shown in a row of a list; ``runs show`` has all."""

tracking_option = click.option(
    "--tracking",
    metavar="URI",
    help="Another store. [default: $MLFLOW_TRACKING_URI or the workspace's]",
)


@click.group()
def runs() -> None:
    """List and show recipe runs, and replay what the tracking server missed.

    \b
    Example:
      toolkit runs list
    """


@runs.command("list")
@click.argument("recipe", required=False)
@click.option("--limit", default=20, show_default=True, help="How many, the newest first.")
@tracking_option
@workspace_option
@json_option
def list_runs(
    recipe: str | None, limit: int, tracking: str | None, workspace: Path | None, as_json: bool
) -> None:
    """List recent recipe runs, or those of RECIPE (a name or a file).

    \b
    Example:
      toolkit runs list recipes/demo/tickets.yaml --limit 5
    """
    from toolkit.tracking import history

    store, name = _store(recipe, tracking, workspace)
    found = history.recipe_runs(store, name, limit)
    if as_json:
        render.as_json([dataclasses.asdict(run) for run in found])
    elif not found:
        render.say(f"no recipe runs in {store.shown} yet: toolkit run RECIPE makes one")
    else:
        columns = ("run", "recipe", "status", "started", "time", "metrics")
        render.table(columns, [_row(run) for run in found])


@runs.command("show")
@click.argument("run_id")
@tracking_option
@workspace_option
@json_option
def show_run(run_id: str, tracking: str | None, workspace: Path | None, as_json: bool) -> None:
    """Show the steps of a recipe run: time, metrics, artifacts. The first digits are enough.

    \b
    Example:
      toolkit runs show 3fa9c1
    """
    from toolkit.tracking import history

    store, _ = _store(None, tracking, workspace)
    shown = history.recipe_run(store, run_id)
    if as_json:
        render.as_json(dataclasses.asdict(shown))
        return
    run = shown.run
    render.say(f"{run.name}  {run.status}  {_when(run)}  {_took(run)}  {run.run_id}")
    if run.error:
        render.say(run.error)
    columns = ("step", "status", "time", "metrics", "artifact", "run")
    render.table(columns, [_step_row(step) for step in shown.steps])
    if shown.url:
        render.say(shown.url)


@runs.command("sync")
@workspace_option
@json_option
def sync_runs(workspace: Path | None, as_json: bool) -> None:
    """Bring to the tracking store what it missed while it could not be reached.

    \b
    Example:
      toolkit runs sync
    """
    from toolkit.tracking.replay import sync
    from toolkit.workspace import Workspace

    replayed = sync(Workspace.locate(workspace).root / "tracking")
    if as_json:
        render.as_json([dataclasses.asdict(one) for one in replayed])
    else:
        for one in replayed:
            became = f"still here: {one.lost}" if one.lost else f"run {one.run_id} is complete"
            render.say(f"{one.name}: {became}")
            for reason in one.refused:
                render.hint(f"  MLflow refused {reason}")
        if not replayed:
            render.say("nothing was missed")
    if left := [one for one in replayed if one.lost]:
        raise TrackingError(
            f"{len(left)} of {len(replayed)} runs could not be delivered",
            "start the server, then toolkit runs sync",
        )


@click.command()
@click.argument("recipe", required=False)
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Anything wider is open to all who reach it.",
)
@click.option("--open", "open_browser", is_flag=True, help="Open a browser.")
@tracking_option
@workspace_option
def ui(
    *,
    recipe: str | None,
    port: int,
    host: str,
    open_browser: bool,
    tracking: str | None,
    workspace: Path | None,
) -> None:
    """Run the MLflow UI on the workspace's store, or on the one that RECIPE names. Ctrl-C ends it.

    \b
    Example:
      toolkit ui --port 5001
    """
    from toolkit.tracking import check
    from toolkit.tracking.ui import serving

    store, _ = _store(recipe, tracking, workspace)
    check(store)
    if store.uri.startswith("http"):
        _announce(store.uri, open_browser)
        return
    log = store.outboxes.parent / "mlflow-ui.log"
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104 - compared, not bound
    render.hint(f"starting the MLflow UI on {store.shown} ...")
    with serving(store, host, port, log) as server:
        _announce(url, open_browser)
        status = server.wait()
    raise TrackingError(f"the MLflow UI ended with {status}", f"its log is {log}")


def _announce(url: str, open_browser: bool) -> None:
    render.say(f"MLflow: {url}")
    if open_browser:
        click.launch(url)


def _store(
    recipe: str | None, tracking: str | None, workspace: Path | None
) -> tuple[Store, str | None]:
    """The store asked for, checked, and the recipe's name."""
    from toolkit.tracking.store import check, resolve
    from toolkit.workspace import Workspace

    name, own = recipe, None
    if recipe and Path(recipe).is_file():
        from toolkit.recipe.load import load

        loaded = load(Path(recipe)).recipe
        name, own = loaded.name, loaded.tracking.uri
    store = resolve(tracking or own, Workspace.locate(workspace))
    check(store)
    return store, name


def _row(run: RunSummary) -> tuple[str | None, ...]:
    return run.run_id[:8], run.name, run.status, _when(run), _took(run), _metrics(run, KEY_METRICS)


def _step_row(step: RunSummary) -> tuple[str | None, ...]:
    status = "cached" if step.cached else step.status
    result = step.error or _metrics(step, None)
    return step.name, status, _took(step), result, step.artifact, step.run_id[:8]


def _metrics(run: RunSummary, most: int | None) -> str:
    """Metrics of evaluations first: they are what a run is judged by."""
    keys = sorted(run.metrics, key=lambda key: (not key.startswith("evaluate"), key))[:most]
    return "  ".join(f"{key}={run.metrics[key]:.4g}" for key in keys)


def _when(run: RunSummary) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started_s))


def _took(run: RunSummary) -> str | None:
    return None if run.duration_s is None else render.duration(run.duration_s)
