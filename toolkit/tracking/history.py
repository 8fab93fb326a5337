"""What a store tells about runs: recipe runs, and the steps of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.errors import UsageError
from toolkit.tracking import client as mlflow_client
from toolkit.tracking.store import Store

MOST_RUNS = 1000


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        run_id: MLflow's id.
        name: Recipe or step.
        status: MLflow's word: RUNNING, FINISHED, FAILED, KILLED.
        started_s: Unix time of the start.
        duration_s: Seconds from start to end; ``None`` while it runs.
        metrics: Last value of every metric but ``system/...``.
        artifact: Folder of the step's artifact.
        error: Why it failed.
        cached: The work was done by an earlier recipe run.
    """

    run_id: str
    name: str
    status: str
    started_s: float
    duration_s: float | None
    metrics: dict[str, float]
    artifact: str | None = None
    error: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class RecipeSummary:
    """A recipe run and its steps in the order of their start."""

    run: RunSummary
    steps: tuple[RunSummary, ...]
    url: str | None
    """Its page, where the store is a server."""


def recipe_runs(store: Store, recipe: str | None = None, limit: int = 20) -> list[RunSummary]:
    """Recent recipe runs, the newest first."""
    client = _reader(store)
    if client is None:
        return []
    query = "tags.`toolkit.kind` = 'recipe'"
    if recipe:
        query += f" and tags.`toolkit.recipe` = '{recipe.replace(chr(39), '')}'"
    found = client.search_runs(
        _experiments(client), query, max_results=limit, order_by=["start_time DESC"]
    )
    return [_summary(run) for run in found]


def recipe_run(store: Store, run_id: str) -> RecipeSummary:
    """One recipe run with its steps; the first digits of its id are enough.

    Raises:
        UsageError: No run, or several, have an id that begins so.
    """
    client = _reader(store)
    parent = _one(client, store, run_id)
    experiment, whole = parent.info.experiment_id, parent.info.run_id
    own = client.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{whole}'", max_results=MOST_RUNS
    )
    have = {run.info.run_id for run in own}
    tags = parent.data.tags
    linked = [v for k, v in tags.items() if k.startswith("toolkit.step.") and v and v not in have]
    steps = [_summary(run) for run in own] + [
        _summary(client.get_run(i), cached=True) for i in linked
    ]
    steps.sort(key=lambda step: step.started_s)
    server = store.uri.rstrip("/") if store.uri.startswith("http") else None
    url = f"{server}/#/experiments/{experiment}/runs/{whole}" if server else None
    return RecipeSummary(_summary(parent), tuple(steps), url)


def _reader(store: Store) -> Any:
    """A client; ``None`` where a SQLite store was never made, so that looking makes nothing."""
    if store.sqlite_file and not store.sqlite_file.exists():
        return None
    return mlflow_client.connect(store)


def _experiments(client: Any) -> list[str]:
    return [
        experiment.experiment_id for experiment in client.search_experiments(max_results=MOST_RUNS)
    ]


def _one(client: Any, store: Store, run_id: str) -> Any:
    runs = (
        []
        if client is None
        else client.search_runs(
            _experiments(client), "tags.`toolkit.kind` = 'recipe'", max_results=MOST_RUNS
        )
    )
    found = [run for run in runs if run.info.run_id.startswith(run_id)]
    if len(found) == 1:
        return found[0]
    what = "no recipe run has" if not found else f"{len(found)} recipe runs have"
    raise UsageError(
        f"{what} an id that begins with {run_id!r} in {store.shown}",
        "`toolkit runs list` shows their ids",
    )


def _summary(run: Any, *, cached: bool = False) -> RunSummary:
    info, data = run.info, run.data
    return RunSummary(
        run_id=info.run_id,
        name=info.run_name,
        status=info.status,
        started_s=info.start_time / 1000,
        duration_s=None if info.end_time is None else (info.end_time - info.start_time) / 1000,
        metrics={k: v for k, v in sorted(data.metrics.items()) if not k.startswith("system/")},
        artifact=data.tags.get("toolkit.artifact"),
        error=data.tags.get("toolkit.error"),
        cached=cached,
    )
