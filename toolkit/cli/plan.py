"""``plan``: what would run, why, where, and what it takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render
from toolkit.cli.options import recipe_options

if TYPE_CHECKING:
    from toolkit.prepare import Prepared
    from toolkit.survey import StepStatus


@click.command()
@recipe_options
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    profile: str | None,
    workspace: Path | None,
    as_json: bool,
) -> None:
    """Show for every step whether it is done or will run, why, where, and in which environment.

    Needs no GPU and starts nothing. A recipe that cannot work is refused here, each thing with its
    fix; with --json every verdict of preflight is shown, with where it was learned.

    \b
    Example:
      toolkit plan recipes/demo/tickets.yaml --set train.learning_rate=2e-4
    """
    from toolkit.preflight import insist
    from toolkit.prepare import examine

    prepared = examine(recipe, overrides, profile, workspace)
    statuses = prepared.survey()
    if as_json:
        render.as_json(
            {
                "recipe": str(recipe),
                "engine": asdict(prepared.choice) if prepared.choice else None,
                "rollout": prepared.rollout,
                "training": _training(prepared),
                "warnings": prepared.warnings,
                "preflight": [verdict.as_json() for verdict in prepared.verdicts],
                "memory_unknown": prepared.memory_unknown,
                "memory": [one.as_json() for one in prepared.memory],
                "steps": [_described(s, prepared) for s in statuses],
            }
        )
    else:
        _show_memory(prepared)
    insist(prepared.verdicts)
    if as_json:
        return
    rows = [
        (
            s.step.name,
            "done" if s.done else "run",
            "" if s.done else s.why,
            _where(s, prepared),
            s.step.fingerprint[:8],
        )
        for s in statuses
    ]
    render.table(("step", "state", "why", "environment", "fingerprint"), rows)
    if prepared.memory_unknown:
        render.say(prepared.memory_unknown)
    if prepared.speed_said:
        render.say(prepared.speed_said)
    if prepared.choice:
        render.say(f"served by {prepared.choice.engine}: {prepared.choice.reason}")
    for text in filter(None, map(_counted, statuses)):
        render.say(text)
    if prepared.rollout:
        render.say(f"answers are written by {prepared.rollout}")
    if prepared.training_said:
        render.say(prepared.training_said)
    if sweep := prepared.loaded.recipe.sweep:
        render.say(f"it has a sweep over {', '.join(sweep.over)}: toolkit sweep {recipe} --dry-run")
    render.warn(prepared.warnings)
    done = sum(s.done for s in statuses)
    render.say(
        f"{done} of {len(statuses)} steps are done; artifacts are in {prepared.workspace.root}"
    )


def _counted(status: StepStatus) -> str | None:
    """What became of the rows, where the data step is done."""
    if status.step.stage != "data" or status.artifact is None:
        return None
    numbers = status.artifact.metrics
    lost = {
        "unreadable": "rows_invalid",
        "too long": "rows_too_long",
        "without a trained token": "rows_without_trained_token",
        "truncated": "rows_truncated",
    }
    parts = [f"{numbers[key]:.0f} {name}" for name, key in lost.items() if numbers.get(key)]
    kept = f"{numbers['rows_train']:.0f} rows to train, {numbers['rows_heldout']:.0f} held out"
    return f"data: {', '.join([kept, *parts])}"


MEMORY_COLUMNS = {
    "weights": ("weights", "gathered blocks"),
    "adapters": ("adapter", "LoRA slots"),
    "optimizer": ("optimizer",),
    "gradients": ("gradients",),
    "activations": ("activations", "hessians"),
    "logits": ("logits",),
    "KV cache": ("KV cache",),
    "rest": ("workspace", "fragmentation", "CUDA context", "engine"),
}
"""Columns of the table of memory -> the parts that each holds."""


def _show_memory(prepared: Prepared) -> None:
    """GiB on one GPU at the peak of each step, and what would make it fit."""
    from toolkit.forecast.parts import gib

    if not prepared.memory:
        return
    rows = []
    for one in prepared.memory:
        sizes = [one.forecast.bytes_of(*names) for names in MEMORY_COLUMNS.values()]
        limit = one.forecast.limit
        shown = [gib(size) if size else "" for size in (*sizes, one.forecast.total, limit or 0)]
        rows.append((one.step, *shown, str(one.fit)))
    columns = ("GiB at the peak", *MEMORY_COLUMNS, "all", "there is", "verdict")
    render.table(columns, rows)
    for one in prepared.memory:
        for note in one.notes:
            render.say(f"{one.step}: {note}")
        if one.proposal:
            total = gib(one.proposal.forecast.total)
            render.say(f"{one.step} fits with {one.proposal.text} ({total} GiB)")


def _training(prepared: Prepared) -> dict[str, Any] | None:
    """How many processes train together, and how."""
    train = prepared.loaded.recipe.train
    if train is None:
        return None
    return asdict(prepared.launch) | {
        "parallel": train.parallel if prepared.launch.ranks > 1 else None,
        "reason": prepared.parallel.reason if prepared.parallel else None,
        "speed": asdict(prepared.speed) if prepared.speed else None,
        "effective_batch": train.batch_size * train.gradient_accumulation * prepared.launch.ranks,
    }


def _where(status: StepStatus, prepared: Prepared) -> str:
    parts = []
    for name in status.step.environments:
        environment = prepared.environments[name]
        absent = "not built" if environment.lock else "not there"
        label = environment.lock or name
        parts.append(label if status.done or environment.is_ready else f"{label} ({absent})")
    return " + ".join(parts)


def _described(status: StepStatus, prepared: Prepared) -> dict[str, Any]:
    step = status.step
    return {
        "name": step.name,
        "stage": step.stage,
        "state": "done" if status.done else "run",
        "why": status.why,
        "fingerprint": step.fingerprint,
        "inputs": dict(step.inputs),
        "device": prepared.device,
        "environments": {
            name: {
                "lock": prepared.environments[name].lock,
                "ready": prepared.environments[name].is_ready,
            }
            for name in step.environments
        },
        "artifact": str(prepared.workspace.artifact(step.stage, step.fingerprint)),
    }
