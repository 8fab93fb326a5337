"""``toolkit adapters``: what a running server serves beside its base, changed under traffic; and the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, profile_option, set_option, workspace_option

if TYPE_CHECKING:
    from toolkit.serving.state import AdapterSpec

PATIENCE_S = 3600.0
"""Longest wait for a change: loads, proofs, and old streams that finish."""
POLL_S = 0.3

server_option = click.option(
    "--server", metavar="NAME", help="Name of the server. [default: the only one that runs]"
)


def change_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--server``, ``--workspace`` and ``--json``."""
    for option in (json_option, workspace_option, server_option):
        command = option(command)
    return command


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
    answer = _Server.pick(server, workspace).ask("GET", "/adapters")
    if as_json:
        render.as_json(answer)
        return
    rows = answer["adapters"]
    columns = ("name", "variant", "weight", "version", "open requests", "source", "run")
    render.table(columns, [_row(row) for row in rows])
    render.say(f"{len(rows)} of {answer['slots']} slots, ranks up to {answer['max_rank']}")


@adapters.command()
@click.argument("name")
@click.argument("source")
@change_options
def load(name: str, source: str, **where: Any) -> None:
    """Add an adapter that clients ask for as NAME.

    \b
    Example:
      toolkit adapters load billing ./adapters/billing
    """
    _with_source("load", name, source, **where)


@adapters.command()
@click.argument("name")
@click.argument("source")
@change_options
def swap(name: str, source: str, **where: Any) -> None:
    """Replace NAME by the adapter in SOURCE, under traffic.

    \b
    Example:
      toolkit adapters swap billing models:/billing/4
    """
    _with_source("swap", name, source, **where)


@adapters.command()
@click.argument("name")
@change_options
def unload(name: str, **where: Any) -> None:
    """Take NAME away; open requests finish.

    \b
    Example:
      toolkit adapters unload billing
    """
    _order("unload", {"name": name}, **where)


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


@adapters.command()
@click.argument("name")
@change_options
def promote(name: str, **where: Any) -> None:
    """Give the canary of NAME all requests; the stable version goes.

    \b
    Example:
      toolkit adapters promote billing
    """
    _order("promote", {"name": name}, **where)


@adapters.command()
@click.argument("name")
@change_options
def abort(name: str, **where: Any) -> None:
    """Take the canary of NAME away; the stable version gets all requests.

    \b
    Example:
      toolkit adapters abort billing
    """
    _order("abort", {"name": name}, **where)


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


class _Server:
    """A running server, reached over its control socket."""

    def __init__(self, name: str, control: Path, place: Path) -> None:
        self.name, self._control, self._place = name, control, place

    @classmethod
    def pick(cls, name: str | None, workspace: Path | None) -> _Server:
        from toolkit.engines import records
        from toolkit.workspace import Workspace

        servers = Workspace.locate(workspace).servers
        record = records.pick(servers, name)
        return cls(record.name, Path(record.control), servers / record.name)

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = 10.0,
    ) -> dict[str, Any]:
        from toolkit.serving.control import request

        return request(self._control, method, path, body, timeout_s=timeout_s)

    def bring(self, name: str, source: str) -> AdapterSpec:
        from toolkit.serving.registry import ModelRegistry
        from toolkit.serving.sources import bring
        from toolkit.serving.state import ServerSpec

        registry = ModelRegistry.of(ServerSpec.read(self._place))
        return bring(name, source, Path.cwd(), registry)


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
    chosen = _Server.pick(server, workspace)
    line = render.ProgressLine(f"{order} {name}")
    line.update(f"bringing {source}", at_once=True)
    spec = chosen.bring(name, source)
    _send(chosen, order, {"spec": asdict(spec), **(more or {})}, line, as_json)


def _order(
    order: str,
    body: Mapping[str, Any],
    *,
    server: str | None,
    workspace: Path | None,
    as_json: bool,
) -> None:
    line = render.ProgressLine(f"{order} {body['name']}")
    _send(_Server.pick(server, workspace), order, body, line, as_json)


def _send(
    server: _Server, order: str, body: Mapping[str, Any], line: render.ProgressLine, as_json: bool
) -> None:
    """Send an order, and show what the server is doing until it is done."""
    from concurrent.futures import ThreadPoolExecutor, wait

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, "POST", f"/adapters/{order}", body, PATIENCE_S)
        while not wait([answer], POLL_S).done:
            line.update(_doing(server))
    change = answer.result()
    line.close(_done(change))
    if as_json:
        render.as_json(change)
    elif change["cut"]:
        render.hint(f"{change['cut']} requests were still open on the old version")


def _doing(server: _Server) -> str:
    from toolkit.errors import EngineError

    try:
        return str(server.ask("GET", "/adapters")["doing"])
    except EngineError:
        return "no answer"


def _done(change: Mapping[str, Any]) -> str:
    parts = [f"loaded {', '.join(change['loaded'])}"] if change["loaded"] else []
    parts += [f"unloaded {', '.join(change['unloaded'])}"] if change["unloaded"] else []
    times = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in change["seconds"].items())
    return f"{'; '.join(parts) or 'nothing to do'} ({times})"


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
