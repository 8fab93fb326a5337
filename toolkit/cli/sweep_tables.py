"""Sweeps in a terminal: trials, what changed, how it ended."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from toolkit.cli import render

if TYPE_CHECKING:
    from toolkit.sweep.folder import SweepFolder, Trial


WORDS = {"FINISHED": "succeeded", "FAILED": "failed", "KILLED": "cancelled"}
"""States by MLflow's words."""


def count(folder: SweepFolder) -> int:
    """How many trials it has, those that Optuna will choose among them."""
    section = folder.asked["section"]
    return int(section["trials"]) if section["method"] == "optuna" else len(folder.trials)


def state(folder: SweepFolder) -> str:
    """As of jobs (``running``, ``succeeded``, ...); ``stopped`` by an error, ``paused`` by a kill of its driver."""
    from toolkit.launch.holding import is_held

    if result := folder.result:
        return WORDS[result["status"]]
    if folder.stopped:
        return "stopped"
    return "running" if is_held(folder.lock) else "paused"


def summary(folder: SweepFolder) -> dict[str, Any]:
    """All of a sweep as JSON."""
    trials, asked = folder.trials, folder.asked
    best = folder.best(trials)
    return {
        "sweep": folder.id,
        "state": state(folder),
        "recipe": asked["recipe"],
        "step": asked["step"],
        "metric": asked["metric"],
        "goal": asked["goal"],
        "trials": [asdict(one) for one in trials],
        "best": asdict(best) | {"command": folder.command(best)} if best else None,
        "stopped": folder.stopped,
    }


def show(folder: SweepFolder) -> None:
    """Say where a sweep stands: its trials, and the best up to now."""
    trials, asked = folder.trials, folder.asked
    best = folder.best(trials)
    keys = list(asked["section"]["over"])
    columns = ("trial", *keys, asked["metric"], "state", "chain", "reason")
    rows = [
        (
            one.number,
            *(cell(one.values[key]) for key in keys),
            None if one.value is None else float(f"{one.value:.6g}"),
            f"{one.state.value}{' (best)' if one == best else ''}",
            one.chain,
            one.reason,
        )
        for one in trials
    ]
    render.table(columns, rows)
    over = sum(one.state.ended for one in trials)
    render.say(
        f"{folder.id}: {state(folder)}; {over} of {count(folder)} trials are over; {asked['goal']} "
        f"{asked['metric']} of {asked['step']}"
    )
    if best:
        render.say(f"best: trial {best.number}, {asked['metric']} {best.value:.6g}")
        render.say(f"run it:  {folder.command(best)}{where(folder)}")


def changes(folder: SweepFolder, shown: dict[int, str]) -> None:
    """Print a line for each trial that is not as it was shown."""
    from toolkit.sweep.space import shown as values_of

    trials = folder.trials
    best = folder.best(trials)
    for one in trials:
        text = _line(one, folder.asked["metric"], best=one == best)
        if shown.get(one.number) == text or (one.state == "queued" and not one.reason):
            continue
        if shown.get(one.number, "").removesuffix(" (best)") != text.removesuffix(" (best)"):
            render.hint(f"[trial {one.number}: {values_of(one.values)}] {text}")
        shown[one.number] = text


def _line(trial: Trial, metric: str, *, best: bool) -> str:
    measured = "" if trial.value is None else f", {metric} {trial.value:.6g}"
    reason = f": {trial.reason}" if trial.reason else ""
    chain = f" as {trial.chain}" if trial.state == "running" else ""
    return f"{trial.state.value}{chain}{measured}{reason}{' (best)' if best else ''}"


def closing(folder: SweepFolder, *, as_json: bool) -> int:
    """Show how a sweep ended, or why it stopped; the exit code."""
    from toolkit.errors import StepFailedError, ToolkitError

    if as_json:
        render.as_json(summary(folder))
    else:
        show(folder)
    if stopped := folder.stopped:
        again = (
            f"then the same command goes on; {stopped['hint'] or 'nothing that is done is lost'}"
        )
        render.error(ToolkitError(str(stopped["message"]), again))
        return int(stopped["exit_code"])
    status = (folder.result or {}).get("status")
    if status == "FINISHED":
        return 0
    again = f"toolkit sweeps retry {folder.id}{where(folder)}"
    why = next((one for one in folder.trials if one.state == "failed"), None)
    if status == "FAILED" and why:
        said = f"all trials of {folder.id} failed; trial {why.number}: {why.reason}"
        log = f"toolkit jobs show {why.chain}{where(folder)}; " if why.chain else ""
        render.error(StepFailedError(said, f"{log}then {again}"))
    else:
        render.error(StepFailedError(f"{folder.id} was cancelled", again))
    return 1


def cell(value: Any) -> Any:
    """A value in a table: numbers and texts as they are, the rest as JSON."""
    plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return value if plain else json.dumps(value)


def where(folder: SweepFolder) -> str:
    """The option that finds the workspace again, where it is not the default one."""
    from toolkit.workspace import Workspace

    root = folder.path.parent.parent
    return "" if Workspace.locate().root == root else f" --workspace {root}"
