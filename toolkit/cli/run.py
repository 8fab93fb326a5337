"""``run``, and the plan cut to one stage: ``train``, ``export``, ``quantize``, ``evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import outcome as outcomes
from toolkit.cli import render
from toolkit.cli.options import recipe_options

if TYPE_CHECKING:
    from toolkit.execute import RunOutcome


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


profile_option = click.option(
    "--profile-steps",
    metavar="FIRST:LAST",
    help="Record these optimizer steps, such as 10:13, with PyTorch's profiler; trace and table go "
    "to the step's folder and MLflow.",
)


@click.command()
@running_options
@profile_option
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
            _insist_on_one_way(options)
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
)(profile_option(_train))
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
    profile_steps: str | None = None,
) -> RunOutcome:
    """Prepare, run, and show how it went."""
    from toolkit import execute
    from toolkit.prepare import prepare
    from toolkit.train.watch import window as profiling
    from toolkit.worker import raise_on_sigterm

    raise_on_sigterm()
    window = profiling.Window.parse(profile_steps) if profile_steps is not None else None
    prepared = prepare(recipe, overrides, profile, workspace)
    if stages:
        prepared = prepared.cut(stages)
    statuses = prepared.survey()
    if only:
        prepared.require_inputs(statuses, stages)
    if window:
        profiling.insist(window, prepared.loaded.recipe, statuses)
    prepared.require_environments(statuses)
    render.warn(prepared.warnings)
    outcome = execute.run_plan(
        prepared,
        statuses,
        render.Progress().show,
        resume=resume,
        frozen=frozen,
        profile_steps=window,
    )
    if as_json:
        render.as_json(outcomes.summary(outcome))
    else:
        outcomes.show(outcome, prepared)
    return outcome


def _insist_on_one_way(options: dict[str, Any]) -> None:
    """A probe keeps nothing, so there would be no place for a trace.

    Raises:
        UsageError: Both are asked for.
    """
    from toolkit.errors import UsageError

    if options.get("profile_steps") is not None:
        raise UsageError(
            "--probe keeps nothing, and --profile-steps would have nowhere to write",
            "give one of them",
        )


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
