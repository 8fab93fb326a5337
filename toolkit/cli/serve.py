"""``serve``: one model of a recipe behind the OpenAI API, in the foreground or detached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

WATCH_S = 15
"""Seconds between two looks at aliases with ``--watch``."""

if TYPE_CHECKING:
    from toolkit.artifact import Artifact
    from toolkit.engines.records import ServerRecord
    from toolkit.prepare import Prepared
    from toolkit.proof.choice import Choice, Numbers
    from toolkit.serving.state import ServerStatus
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
@click.option("--detach", is_flag=True, help="Return when it is ready and leave it running.")
@click.option(
    "--watch", is_flag=True, help="Follow aliases of serve.adapters, as serve.watch_s does."
)
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
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    metavar="S",
    help="With --stop: seconds that open requests get. [default: serve.drain_s]",
)
@click.option("--status", is_flag=True, help="List the servers of the workspace and their parts.")
@json_option
def serve(recipe: Path | None, workspace: Path | None, as_json: bool, **options: Any) -> None:
    """Serve one model of RECIPE; what it needs is made first.

    /readyz says yes when the engine (or each of serve.replicas) is up and the proofs have shown
    that it serves what was trained; a proof that fails ends with exit code 1 and the cause.

    In the foreground until Ctrl-C or SIGTERM: /readyz says no at once, open requests finish
    (serve.drain_s at most), everything is stopped and the exit code is 0. A second signal ends it
    now. Ctrl-C before it is ready gives 130. Nothing survives a killed toolkit, unless --detach
    asked for it; a part that dies or hangs is started again, five times in ten minutes.

    \b
    Examples:
      toolkit serve recipes/demo/tickets.yaml
      toolkit serve recipes/demo/tickets.yaml --model gptq --detach --set serve.port=0
      toolkit serve recipes/demo/tickets.yaml --set serve.replicas=2
      toolkit serve recipes/serve/by-alias.yaml --watch
      toolkit serve --status
      toolkit serve --stop --drain 60
    """
    from toolkit.errors import UsageError
    from toolkit.workspace import Workspace

    subject, stop, status = (options.pop(key) for key in ("subject", "stop", "status"))
    drain = options.pop("drain")
    if drain is not None and stop is None:
        raise UsageError(
            "--drain goes with --stop", "a server's own drain is --set serve.drain_s=S"
        )
    if stop is not None or status:
        if recipe is not None or (stop is not None and status):
            raise UsageError("--stop and --status stand alone", "toolkit serve --stop NAME")
        place = Workspace.locate(workspace)
        if status:
            _status(place, as_json)
        else:
            _stop(place, stop or None, drain, as_json)
        return
    if recipe is None:
        raise UsageError("RECIPE is missing", "toolkit serve RECIPE, or: toolkit serve --status")
    if options.pop("watch"):
        options["overrides"] = (f"serve.watch_s={WATCH_S}", *options["overrides"])
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
    choice = _subject(prepared, subject)
    inputs = _make_inputs(prepared, choice.subject, only=only)
    record = _serve(prepared, choice, inputs, detach=detach, as_json=as_json)
    if not detach:
        render.hint(f"stopped {record.name}")


def _subject(prepared: Prepared, subject: str | None) -> Choice:
    """What to serve; ``why`` is empty where there was nothing to choose."""
    from toolkit.errors import PreflightError, UsageError
    from toolkit.proof.choice import Choice
    from toolkit.registry import close_match

    recipe = prepared.loaded.recipe
    if recipe.serve is None:
        raise PreflightError(
            f"{prepared.loaded.path} has no serve section", "add `serve: {engine: vllm}` to it"
        )
    if subject is None:
        return _preferred(prepared)
    if subject not in recipe.served:
        raise UsageError(
            f"serve.models does not name {subject!r}{close_match(subject, recipe.served)}",
            f"it names {', '.join(recipe.served)}; change it with --set 'serve.models=[{subject}]'",
        )
    return Choice(subject, "")


def _preferred(prepared: Prepared) -> Choice:
    """The first of `serve.models`, or where two ways to quantize are rivals, what `serve.prefer` says."""
    from toolkit.proof.choice import Choice, choose, rivals

    recipe = prepared.loaded.recipe
    found = rivals(recipe)
    if found is None:
        return Choice(recipe.served[0], "")
    choice = choose(found, _measured(prepared, found.subjects))
    render.hint(f"serving {choice.subject}: {choice.why}")
    return choice


def _measured(prepared: Prepared, subjects: Sequence[str]) -> Numbers:
    """What finished proofs and evaluations say of each subject."""
    from toolkit.proof.choice import numbers_of

    done = {s.step.name: s.artifact.metrics for s in prepared.survey() if s.artifact}
    found: dict[str, Mapping[str, float]] = {}
    for subject in subjects:
        served, scored = (done.get(f"{stage}-{subject}", {}) for stage in ("serve", "evaluate"))
        found |= numbers_of(subject, served, scored)
    return found


def _make_inputs(prepared: Prepared, subject: str, *, only: bool) -> dict[str, Artifact]:
    """Make what the server loads (not the proof that ``toolkit run`` makes of it)."""
    from toolkit import execute
    from toolkit.worker import raise_on_sigterm

    roles = {
        role: name
        for role, name in prepared.plan.step(f"serve-{subject}").inputs.items()
        if role.split()[0] in ("model", "adapter")
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
    prepared: Prepared, choice: Choice, inputs: dict[str, Artifact], *, detach: bool, as_json: bool
) -> ServerRecord:
    from toolkit.engines.foreground import serve as serve_until_told
    from toolkit.serving.resolve import server_spec

    spec = server_spec(prepared, choice.subject, inputs, detached=detach, why=choice.why)
    line = render.ProgressLine(f"serve {spec.section.engine}")

    def ready(record: ServerRecord) -> None:
        line.close("ready")
        _show_ready(record, as_json)

    show = _shown(line)
    return serve_until_told(spec, detach=detach, on_event=show, on_ready=ready)


def _shown(line: render.ProgressLine) -> Callable[[Mapping[str, Any]], None]:
    """Shows events: one moving line until it is ready, a line each for what happens later."""

    def show(event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "parts":
            waiting = [p for p in event["parts"] if p["state"] not in ("ready", "stopped")]
            if waiting and not event["ready"]:
                last = waiting[-1]
                line.update(f"{last['name']} {last['state']} {last['detail'] or ''}".rstrip())
        elif kind == "restart":
            cause, *rest = event["cause"].splitlines()
            render.hint(f"{event['part']} is started again in {event['delay_s']:g} s: {cause}")
            for text in rest:
                render.hint(text)
        elif kind == "draining":
            render.hint(f"open requests get {event['drain_s']:g} s; Ctrl-C again ends them now")
        elif kind == "note":
            render.hint(f"{event.get('part', 'note')}: {event['text']}")

    return show


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


def _stop(workspace: Workspace, name: str | None, drain_s: float | None, as_json: bool) -> None:
    from toolkit.engines import records

    record = records.pick(workspace.servers, name)
    records.stop(workspace.servers, record, drain_s)
    if as_json:
        render.as_json({"stopped": record.name})
    else:
        render.say(f"stopped {record.name} ({record.url})")


def _status(workspace: Workspace, as_json: bool) -> None:
    from toolkit.engines import records

    found = [(record, _asked(record)) for record in records.living(workspace.servers)]
    if as_json:
        render.as_json(
            [asdict(record) | {"status": status and asdict(status)} for record, status in found]
        )
    elif not found:
        render.say(f"no server of {workspace.root} runs")
    else:
        rows = [_row(record, status) for record, status in found]
        render.table(("server", "url", "ready", "models", "open requests", "engine", "pid"), rows)
        for record, status in found:
            if status:
                columns = ("part", "state", "pid", "restarts", "url", "detail")
                parts = [tuple(asdict(part).values()) for part in status.parts]
                render.table(columns, parts, title=record.name)


def _asked(record: ServerRecord) -> ServerStatus | None:
    from toolkit.errors import EngineError

    try:
        return record.status()
    except EngineError:
        return None


def _row(record: ServerRecord, status: ServerStatus | None) -> tuple[Any, ...]:
    if status is None:
        return (record.name, record.url, "does not answer", "", None, record.engine, record.pid)
    ready = "yes" if status.ready else f"no: {status.reason}"
    models = ", ".join(status.models)
    waiting = sum(status.in_flight.values())
    return (record.name, record.url, ready, models, waiting, record.engine, record.pid)
