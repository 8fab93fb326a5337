"""``run``, and the plan cut to one stage: ``train``, ``export``, ``quantize``, ``evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import outcome as outcomes
from toolkit.cli import render
from toolkit.cli.options import job_options
from toolkit.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from toolkit.launch.chain import How
    from toolkit.prepare import Prepared
    from toolkit.survey import StepStatus


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
    return job_options(command)


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
      toolkit run my.yaml --on slurm --detach
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
    on: str | None,
    detach: bool,
    dry_run: bool,
    workspace: Path | None,
    as_json: bool,
    resume: bool,
    frozen: bool,
    only: bool = False,
    profile_steps: str | None = None,
) -> None:
    """Prepare, run here or submit, and show how it went."""
    from toolkit.launch.chain import How
    from toolkit.prepare import prepare
    from toolkit.train.watch import window as profiling
    from toolkit.worker import raise_on_sigterm

    require_on(on, profile, detach=detach, dry_run=dry_run)
    raise_on_sigterm()
    window = profiling.Window.parse(profile_steps) if profile_steps is not None else None
    prepared = prepare(recipe, overrides, on or profile, workspace)
    if stages:
        prepared = prepared.cut(stages)
    statuses = prepared.survey()
    if only:
        prepared.require_inputs(statuses, stages)
    if window:
        profiling.insist(window, prepared.loaded.recipe, statuses)
    prepared.require_environments(statuses)
    render.warn(prepared.warnings)
    how = How(resume, frozen, window)
    if on:
        from toolkit.cli.submitting import run_on

        run_on(prepared, statuses, how, detach=detach, dry_run=dry_run, as_json=as_json)
    else:
        _run_here(prepared, statuses, how, as_json=as_json)


def require_on(on: str | None, profile: str | None, *, detach: bool, dry_run: bool) -> None:
    """Refuse options that make no sense together.

    Raises:
        UsageError: Says which.
    """
    if on and profile:
        raise UsageError(
            "--on and --profile are both given", "--on NAME submits jobs, --profile runs here"
        )
    if not on and (detach or dry_run):
        option = "--detach" if detach else "--dry-run"
        raise UsageError(f"{option} is for jobs", f"add --on NAME, such as --on local {option}")


def _run_here(prepared: Prepared, statuses: list[StepStatus], how: How, *, as_json: bool) -> None:
    from toolkit import execute

    backend = prepared.profile.backend if prepared.profile else "local"
    if backend != "local":
        raise UsageError(
            f"profile {prepared.profile.name if prepared.profile else ''} is for jobs on {backend}",
            "submit them with --on instead of --profile",
        )
    progress = render.Progress()
    try:
        outcome = execute.run_plan(prepared, statuses, progress.show, **vars(how))
    except (Interrupted, KeyboardInterrupt):
        render.hint(
            "\nstopped: finished steps and checkpoints are kept; run the same command again and it goes on"
        )
        raise
    outcomes.report(outcome, prepared, as_json=as_json)


def _insist_on_one_way(options: dict[str, Any]) -> None:
    """A probe keeps nothing, so there would be no place for a trace.

    Raises:
        UsageError: Both are asked for.
    """
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
    on: str | None,
    workspace: Path | None,
    as_json: bool,
    frozen: bool,
    **_: Any,
) -> None:
    """Make what the step reads, run two steps of it on the worst batch, and show forecast and measurement."""
    from toolkit import execute
    from toolkit.prepare import prepare
    from toolkit.worker import raise_on_sigterm

    if on:
        raise UsageError("--probe measures this machine", "leave out --on")
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
    measured = "no GPU to measure"
    if seen:  # the driver knows no owners in a container
        measured = (
            f"measured {gib(seen)} of {gib(facts['gpu_bytes'])} GiB in use on the GPU (other programs "
            f"included), {gib(facts['reserved_bytes'])} of them by PyTorch's allocator"
        )
    expected = f"{gib(facts['total_bytes'])} GiB" if facts["total_bytes"] else "nothing"
    render.say(f"two steps of {facts['batch']}: forecast {expected}, {measured}")
