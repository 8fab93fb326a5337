"""``plan``, ``run``, and the plan cut to one stage: ``train``, ``export``, ``quantize``, ``evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render
from toolkit.cli.options import recipe_options

if TYPE_CHECKING:
    from toolkit.execute import RunOutcome
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
    if prepared.speed:
        render.say(f"trained by the {prepared.speed.path} path: {prepared.speed.reason}")
    if prepared.choice:
        render.say(f"served by {prepared.choice.engine}: {prepared.choice.reason}")
    for text in filter(None, map(_counted, statuses)):
        render.say(text)
    if prepared.rollout:
        render.say(f"answers are written by {prepared.rollout}")
    if prepared.training_said:
        render.say(prepared.training_said)
    _warn(prepared)
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


def _warn(prepared: Prepared) -> None:
    for warning in prepared.warnings:
        render.hint(f"warning: {warning}")


def running_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs steps."""
    for option in (
        click.option(
            "--frozen", is_flag=True, help="Refuse to run when something differs from toolkit.lock."
        ),
        click.option(
            "--resume/--no-resume",
            default=True,
            show_default=True,
            help="Go on from an interrupted step's checkpoints, or start the step anew.",
        ),
    ):
        command = option(command)
    return recipe_options(command)


@click.command()
@running_options
def run(recipe: Path, **options: Any) -> None:
    """Run a recipe from its data to its served models. What is done is not done again.

    \b
    Examples:
      toolkit run recipes/demo/tickets.yaml
      toolkit run my.yaml --set train.epochs=2 --frozen
    """
    run_stages(recipe, (), **options)


def _stage_command(stages: tuple[str, ...], what: str, example: str) -> click.Command:
    @click.command(
        name=stages[0],
        help=f"{what}\n\n\b\nExample:\n  toolkit {example}",
    )
    @running_options
    @click.option(
        "--only",
        is_flag=True,
        help="Refuse when earlier steps are not done, instead of running them.",
    )
    def command(recipe: Path, *, probe: bool = False, **options: Any) -> None:
        if probe:
            run_probe(recipe, stages[0], **options)
        else:
            run_stages(recipe, stages, **options)

    return command


_train = _stage_command(
    ("train",),
    "Run a recipe as far as training; missing inputs are made first.",
    "train recipes/demo/tickets.yaml --set train.lora.rank=8",
)
train = click.option(
    "--probe",
    is_flag=True,
    help="Only try out whether it fits: two steps on the worst batch, measured; keeps nothing.",
)(_train)
export = _stage_command(
    ("export",),
    "Run a recipe as far as the exported adapter and merged model.",
    "export recipes/demo/tickets.yaml",
)
quantize = _stage_command(
    ("quantize",),
    "Run a recipe as far as its quantized models.",
    "quantize recipes/quantize/gptq.yaml",
)
evaluate = _stage_command(
    ("evaluate",),
    "Score every model of a recipe on held-out rows and check the gates (exit code 1 when one fails).",
    "evaluate recipes/demo/tickets.yaml --json",
)


def run_stages(
    recipe: Path,
    stages: Sequence[str],
    *,
    overrides: tuple[str, ...],
    profile: str | None,
    workspace: Path | None,
    as_json: bool,
    resume: bool,
    frozen: bool,
    only: bool = False,
) -> RunOutcome:
    """Prepare, run, and show how it went."""
    from toolkit import execute
    from toolkit.prepare import prepare
    from toolkit.worker import raise_on_sigterm

    raise_on_sigterm()
    prepared = prepare(recipe, overrides, profile, workspace)
    if stages:
        prepared = prepared.cut(stages)
    statuses = prepared.survey()
    if only:
        prepared.require_inputs(statuses, stages)
    prepared.require_environments(statuses)
    _warn(prepared)
    progress = render.Progress()
    outcome = execute.run_plan(prepared, statuses, progress.show, resume=resume, frozen=frozen)
    if as_json:
        render.as_json(summary(outcome))
    else:
        _show(outcome, prepared)
    return outcome


def run_probe(
    recipe: Path,
    name: str,
    *,
    overrides: tuple[str, ...],
    profile: str | None,
    workspace: Path | None,
    as_json: bool,
    frozen: bool,
    **_: Any,
) -> None:
    """Make what the step reads, run two steps of it on the worst batch, and show forecast and measurement."""
    from toolkit import execute
    from toolkit.prepare import prepare
    from toolkit.worker import raise_on_sigterm

    raise_on_sigterm()
    prepared = prepare(recipe, overrides, profile, workspace).cut((name,))
    prepared.require_environments(prepared.survey())
    found = execute.probe(prepared, name, render.Progress().show, frozen=frozen)
    if as_json:
        render.as_json({"metrics": found.metrics, **found.facts})
    else:
        _show_probe(found.facts)


def _show_probe(facts: dict[str, Any]) -> None:
    from toolkit.forecast.parts import gib

    render.table(
        ("part", "forecast GiB"), [(name, gib(size)) for name, size in facts["parts_bytes"].items()]
    )
    seen = facts["measured_bytes"]
    measured = f"measured {gib(seen)} of {gib(facts['gpu_bytes'])}" if seen else "no GPU to measure"
    expected = f"{gib(facts['total_bytes'])} GiB" if facts["total_bytes"] else "nothing"
    render.say(f"two steps of {facts['batch']}: forecast {expected}, {measured}")


def summary(outcome: RunOutcome) -> dict[str, Any]:
    """The outcome as JSON."""
    return {
        "mlflow_run": outcome.parent_run,
        "steps": [
            {
                "name": s.step.name,
                "cached": s.cached,
                "seconds": s.artifact.manifest["seconds"],
                "peak_memory_gib": s.artifact.manifest["peak_memory_gib"],
                "metrics": s.artifact.metrics,
                "artifact": str(s.artifact.path),
                "mlflow_run": (s.artifact.manifest["mlflow"] or {}).get("run_id"),
            }
            for s in outcome.steps
        ],
        "gates": [{"passed": v.passed, "message": v.message} for v in outcome.verdicts],
        "choice": next(
            (s.artifact.manifest["facts"] for s in outcome.steps if s.step.stage == "choose"), None
        ),
    }


def _show(outcome: RunOutcome, prepared: Prepared) -> None:
    rows = []
    for s in outcome.steps:
        manifest = s.artifact.manifest
        run_id = (manifest["mlflow"] or {}).get("run_id", "")
        rows.append(
            (
                s.step.name,
                "done before" if s.cached else render.duration(manifest["seconds"]),
                f"{manifest['peak_memory_gib']:.2f}",
                _headline(s.artifact.metrics, prepared),
                _relative(s.artifact.path),
                run_id[:8],
            )
        )
    render.table(("step", "time", "peak GiB", "result", "artifact", "MLflow run"), rows)
    for verdict in outcome.verdicts:
        render.say(f"gate {'passed' if verdict.passed else 'FAILED'}: {verdict.message}")
    _show_answers(outcome)
    _show_choice(outcome)
    if outcome.parent_run is None:
        render.say("everything is done: nothing had to run")
    if prepared.loaded.recipe.serve:
        render.say(f"serve it:          toolkit serve {prepared.loaded.path}")
    render.say(f"look at the runs:  toolkit ui --workspace {_relative(prepared.workspace.root)}")


def _show_answers(outcome: RunOutcome) -> None:
    """What the served models said to the first question of each."""
    import json

    for s in outcome.steps:
        file = s.artifact.path / "answers.json"
        if s.step.stage == "serve" and file.exists():
            answers = json.loads(file.read_text())
            render.say(f"{s.step.name} was asked: {answers[0]['question']}")
            for model in dict.fromkeys(a["model"] for a in answers):
                said = next(a["answer"] for a in answers if a["model"] == model)
                render.say(f"  {model} said: {_one_line(said)}")


def _show_choice(outcome: RunOutcome) -> None:
    """Which of two ways to serve the tuned model `toolkit serve` takes, with the numbers."""
    for s in outcome.steps:
        if s.step.stage == "choose":
            chosen = s.artifact.manifest["facts"]
            render.say(f"`toolkit serve` takes {chosen['subject']}: {chosen['why']}")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:117]}..."


HEADLINES = (
    "heldout_loss",
    "final_loss",
    "perplexity",
    "size_mb",
    "tokens_per_second",
    "start_seconds",
    "rows",
)
"""Metrics worth a place in the closing table, besides those that the recipe evaluates."""


def _headline(metrics: dict[str, float], prepared: Prepared) -> str:
    section = prepared.loaded.recipe.evaluate
    wanted = (*(section.metrics if section else ()), *HEADLINES)
    shown = [name for name in wanted if name in metrics][:2]
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown)


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
