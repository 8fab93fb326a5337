"""``toolkit adapters``: what a running server serves beside its base, changed under traffic; and the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, profile_option, set_option, workspace_option
from toolkit.cli.running import RunningServer

server_option = click.option(
    "--server", metavar="NAME", help="Name of the server. [default: the only one that runs]"
)


def change_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--server``, ``--workspace`` and ``--json``."""
    for option in (json_option, workspace_option, server_option):
        command = option(command)
    return command


def change(command: Callable[..., Any]) -> click.Command:
    """A command of :func:`adapters` that changes NAME."""
    return adapters.command()(click.argument("name")(change_options(command)))


def change_to(command: Callable[..., Any]) -> click.Command:
    """A command of :func:`adapters` that brings SOURCE under NAME."""
    arguments = click.argument("name")(click.argument("source")(change_options(command)))
    return adapters.command()(arguments)


@click.group()
def adapters() -> None:
    """List, load, swap and unload adapters of a running server; put them into the registry.

    A change is made on all replicas or on none. A new version gets no request before its proof, and the
    old one is unloaded when its last request is done. What is loaded survives a restart.
    SOURCE is a folder, models:/name@alias or models:/name/3.

    \b
    Example:
      toolkit adapters swap tickets models:/tickets@champion
    """


@adapters.command("list")
@change_options
def list_adapters(server: str | None, workspace: Path | None, as_json: bool) -> None:
    """List what is loaded, with open requests and where it came from.

    \b
    Example:
      toolkit adapters list
    """
    answer = RunningServer.pick(server, workspace).ask("GET", "/adapters")
    if as_json:
        render.as_json(answer)
        return
    rows = answer["adapters"]
    columns = ("name", "variant", "weight", "version", "open requests", "source", "run")
    render.table(columns, [_row(row) for row in rows])
    render.say(f"{len(rows)} of {answer['slots']} slots, ranks up to {answer['max_rank']}")


@change_to
def load(name: str, source: str, **where: Any) -> None:
    """Add an adapter that clients ask for as NAME.

    \b
    Example:
      toolkit adapters load billing ./adapters/billing
    """
    _with_source("load", name, source, **where)


@change_to
def swap(name: str, source: str, **where: Any) -> None:
    """Replace NAME by the adapter in SOURCE, under traffic.

    \b
    Example:
      toolkit adapters swap billing models:/billing/4
    """
    _with_source("swap", name, source, **where)


@change
def unload(name: str, **where: Any) -> None:
    """Take NAME away; open requests finish.

    \b
    Example:
      toolkit adapters unload billing
    """
    _order("unload", name, **where)


@adapters.command()
@click.argument("name")
@click.argument("source")
@click.option(
    "--weight",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of the requests.",
)
@click.option(
    "--header",
    default="canary",
    show_default=True,
    help="Value of x-toolkit-target that asks for it whatever the weight.",
)
@change_options
def canary(name: str, source: str, weight: float, header: str, **where: Any) -> None:
    """Try SOURCE on a share of the requests to NAME; compare both in the metrics.

    \b
    Example:
      toolkit adapters canary billing ./adapters/billing-2 --weight 0.2
    """
    _with_source("canary", name, source, {"weight": weight, "header": header}, **where)


@change
def promote(name: str, **where: Any) -> None:
    """Give the canary of NAME all requests; the stable version goes.

    \b
    Example:
      toolkit adapters promote billing
    """
    _order("promote", name, **where)


@change
def abort(name: str, **where: Any) -> None:
    """Take the canary of NAME away; the stable version gets all requests.

    \b
    Example:
      toolkit adapters abort billing
    """
    _order("abort", name, **where)


@adapters.command()
@click.argument("source", metavar="ARTIFACT|RECIPE", type=click.Path(path_type=Path, exists=True))
@click.option("--name", required=True, metavar="MODEL", help="Name of the registered model.")
@click.option("--alias", metavar="ALIAS", help="Alias to move to the version, e.g. champion.")
@click.option(
    "--tracking", metavar="URI", help="Another store. [default: the recipe's or workspace's]"
)
@set_option
@profile_option
@workspace_option
@json_option
def register(
    source: Path, name: str, alias: str | None, workspace: Path | None, *, as_json: bool, **how: Any
) -> None:
    """Put an exported adapter into the MLflow registry: with its run, fingerprint and digest as tags.

    With a RECIPE it is the adapter that the recipe exported; when the recipe has gates, they must have
    passed before --alias is moved.

    \b
    Examples:
      toolkit adapters register recipes/demo/tickets.yaml --name tickets --alias champion
      toolkit adapters register runs/artifacts/export/58e51d02ab24bc30 --name tickets
    """
    from toolkit.serving.registering import of_artifact, of_recipe
    from toolkit.workspace import Workspace

    space, uri = Workspace.locate(workspace), how.pop("tracking")
    line = render.ProgressLine("register")
    line.update(f"{source} as {name}", at_once=True)
    if source.is_dir():
        found = of_artifact(source, name, alias, space, uri=uri)
    else:
        found = of_recipe(source, name, alias, space, uri=uri, **how)
    line.close(f"{found.uri}{f', alias {alias}' if alias else ''}")
    if as_json:
        render.as_json(asdict(found) | {"uri": found.uri, "alias": alias})
    else:
        render.say(found.uri)


def _with_source(
    order: str,
    name: str,
    source: str,
    more: Mapping[str, Any] | None = None,
    *,
    server: str | None,
    workspace: Path | None,
    as_json: bool,
) -> None:
    chosen = RunningServer.pick(server, workspace)
    line = render.ProgressLine(f"{order} {name}")
    line.update(f"bringing {source}", at_once=True)
    spec = chosen.bring(name, source)
    chosen.order(order, {"spec": asdict(spec), **(more or {})}, line, as_json=as_json)


def _order(
    order: str, name: str, *, server: str | None, workspace: Path | None, as_json: bool
) -> None:
    line = render.ProgressLine(f"{order} {name}")
    RunningServer.pick(server, workspace).order(order, {"name": name}, line, as_json=as_json)


def _row(row: Mapping[str, Any]) -> tuple[Any, ...]:
    run = (row.get("run_id") or "")[:8] or None
    source = row.get("registered") or row.get("source")
    return (
        row["name"],
        row["label"],
        row["weight"],
        row["version"],
        row["in_flight"],
        source,
        run,
    )
