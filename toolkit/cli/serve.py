"""``serve``: one model of a recipe behind the OpenAI API, in the foreground or detached."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render
from toolkit.cli.options import (
    json_option,
    profile_option,
    set_option,
    workspace_option,
)

if TYPE_CHECKING:
    from toolkit.artifact import Artifact
    from toolkit.engines.records import ServerRecord
    from toolkit.prepare import Prepared
    from toolkit.workspace import Workspace


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option(
    "--model",
    "subject",
    metavar="SUBJECT",
    help="base, tuned, merged or a quantized one. [default: the first of serve.models]",
)
@set_option
@profile_option
@workspace_option
@click.option("--detach", is_flag=True, help="Return when it is healthy and leave it running.")
@click.option(
    "--only", is_flag=True, help="Refuse when the model is not made, instead of making it."
)
@click.option(
    "--stop",
    is_flag=False,
    flag_value="",
    metavar="[NAME]",
    help="Stop the server called NAME, or the only one.",
)
@click.option("--status", is_flag=True, help="List the servers of the workspace.")
@json_option
def serve(recipe: Path | None, workspace: Path | None, as_json: bool, **options: Any) -> None:
    """Serve one model of RECIPE on 127.0.0.1; what it needs is made first.

    In the foreground until Ctrl-C or SIGTERM: running requests are finished (20 s at most), then
    everything is stopped and the exit code is 0. Ctrl-C before it is healthy gives 130. Nothing
    survives a killed toolkit, unless --detach asked for it.

    \b
    Examples:
      toolkit serve recipes/demo/tickets.yaml
      toolkit serve recipes/demo/tickets.yaml --model gptq --detach --set serve.port=0
      toolkit serve --stop
    """
    from toolkit.errors import UsageError
    from toolkit.workspace import Workspace

    subject, stop, status = (options.pop(key) for key in ("subject", "stop", "status"))
    if stop is not None or status:
        if recipe is not None or (stop is not None and status):
            raise UsageError("--stop and --status stand alone", "toolkit serve --stop NAME")
        place = Workspace.locate(workspace)
        if status:
            _status(place, as_json)
        else:
            _stop(place, stop or None, as_json)
        return
    if recipe is None:
        raise UsageError("RECIPE is missing", "toolkit serve RECIPE, or: toolkit serve --status")
    _start(recipe, subject, workspace, as_json, **options)


def _start(
    recipe: Path,
    subject: str | None,
    workspace: Path | None,
    as_json: bool,
    *,
    overrides: tuple[str, ...],
    profile: str | None,
    detach: bool,
    only: bool,
) -> None:
    from toolkit.prepare import prepare

    prepared = prepare(recipe, overrides, profile, workspace)
    chosen = _subject(prepared, subject)
    inputs = _make_inputs(prepared, chosen, only=only)
    record = _serve(prepared, inputs, detach=detach, as_json=as_json)
    if not detach:
        render.hint(f"stopped {record.name}")


def _subject(prepared: Prepared, subject: str | None) -> str:
    from toolkit.errors import PreflightError, UsageError
    from toolkit.registry import close_match

    recipe = prepared.loaded.recipe
    if recipe.serve is None:
        raise PreflightError(
            f"{prepared.loaded.path} has no serve section", "add `serve: {engine: vllm}` to it"
        )
    chosen = subject or recipe.served[0]
    if chosen not in recipe.served:
        raise UsageError(
            f"serve.models does not name {chosen!r}{close_match(chosen, recipe.served)}",
            f"it names {', '.join(recipe.served)}; change it with --set 'serve.models=[{chosen}]'",
        )
    return chosen


def _make_inputs(prepared: Prepared, subject: str, *, only: bool) -> dict[str, Artifact]:
    """Make what the server loads (not the proof that ``toolkit run`` makes of it)."""
    from toolkit import execute
    from toolkit.worker import raise_on_sigterm

    roles = {
        role: name
        for role, name in prepared.plan.step(f"serve-{subject}").inputs.items()
        if role in ("model", "adapter")
    }
    cut = prepared.cut(names=tuple(roles.values()))
    statuses = cut.survey()
    if only:
        cut.require_inputs(statuses, ())
    cut.require_environments(statuses)
    raise_on_sigterm()
    outcome = execute.run_plan(cut, statuses, render.Progress().show)
    return {role: outcome.artifact(name) for role, name in roles.items()}


def _serve(
    prepared: Prepared, inputs: dict[str, Artifact], *, detach: bool, as_json: bool
) -> ServerRecord:
    from toolkit.engines.foreground import serve_model
    from toolkit.errors import NotInstalledError

    recipe, section = prepared.loaded.recipe, prepared.loaded.recipe.serve
    assert section is not None  # noqa: S101 - _subject refused that
    environment = prepared.environments[section.engine]
    if not environment.is_ready:
        raise NotInstalledError(
            f"the environment of {section.engine} is not built",
            f"toolkit env sync {section.engine}",
        )
    line = render.ProgressLine(f"serve {section.engine}")

    def ready(record: ServerRecord) -> None:
        line.close("healthy")
        _show_ready(record, as_json)

    return serve_model(
        {role: artifact.as_input() for role, artifact in inputs.items()},
        section,
        environment.interpreter(),
        name=section.name or recipe.name,
        max_length=recipe.model.max_length,
        device=prepared.device,
        recipe_dir=prepared.loaded.path.parent,
        workspace=prepared.workspace,
        detach=detach,
        on_phase=lambda phase, _seconds: line.update(phase),
        on_ready=ready,
    )


def _show_ready(record: ServerRecord, as_json: bool) -> None:
    if as_json:
        render.as_json(asdict(record))
        return
    model = list(record.models.values())[-1]
    render.say(f"base URL  {record.url}/v1")
    render.say(f"models    {', '.join(record.models.values())}")
    render.say(f"log       {record.log}")
    render.say("ask it:")
    render.say(f"  curl {record.url}/v1/chat/completions -H 'Content-Type: application/json' \\")
    render.say(
        f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )
    stop = f"toolkit serve --stop {record.name}" if record.detached else "Ctrl-C"
    render.say(f"stop it:  {stop}")


def _stop(workspace: Workspace, name: str | None, as_json: bool) -> None:
    from toolkit.engines import records

    record = records.pick(workspace.servers, name)
    records.stop(workspace.servers, record)
    if as_json:
        render.as_json({"stopped": record.name})
    else:
        render.say(f"stopped {record.name} ({record.url})")


def _status(workspace: Workspace, as_json: bool) -> None:
    from toolkit.engines import records

    found = records.living(workspace.servers)
    if as_json:
        render.as_json([asdict(record) for record in found])
    elif not found:
        render.say(f"no server of {workspace.root} runs")
    else:
        rows = [(r.name, r.url, ", ".join(r.models.values()), r.engine, r.pid) for r in found]
        render.table(("server", "url", "models", "engine", "pid"), rows)
