"""``toolkit keys``: API keys for the front."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, workspace_option

if TYPE_CHECKING:
    from toolkit.gateway.keys import Key


@click.group()
def keys() -> None:
    """Make, list, revoke and rotate API keys of a workspace.

    A server with `front: {keys: true}` takes them; a change is in force within a second, without a restart.

    \b
    Example:
      toolkit keys create billing-app --models tickets --expires 90d
    """


@keys.command()
@click.argument("name")
@click.option("--models", metavar="A,B", help="Models it may ask. [default: all]")
@click.option("--metrics-only", is_flag=True, help="It may read /metrics and ask no model.")
@click.option("--requests-per-minute", type=click.IntRange(min=1), metavar="N", help="Its limit.")
@click.option("--tokens-per-minute", type=click.IntRange(min=1), metavar="N", help="Its limit.")
@click.option("--expires", metavar="30d", help="Lifetime: 12h, 30d, 8w. [default: none]")
@click.option("--tenant", metavar="T", help="Whose key it is. [default: NAME]")
@click.option("--class", "key_class", metavar="C", help="Label in metrics. [default: key]")
@workspace_option
@json_option
def create(name: str, workspace: Path | None, as_json: bool, **options: Any) -> None:
    """Make a key and show it, this once.

    The key goes to standard output; only its hash is kept. Limits that are not given are the recipe's.

    \b
    Example:
      OPENAI_API_KEY=$(toolkit keys create laptop --requests-per-minute 60)
    """
    from toolkit.gateway.keys import editing

    fields = _fields(name, **options)
    with editing(_file(workspace)) as known:
        key, text = known.create(name, **fields)
    _show_new(key, text, as_json)


@keys.command("list")
@click.option("--all", "every", is_flag=True, help="Revoked and expired ones too.")
@workspace_option
@json_option
def list_(every: bool, workspace: Path | None, as_json: bool) -> None:
    """List keys: who may ask what, never the keys themselves.

    \b
    Example:
      toolkit keys list --all
    """
    from toolkit.gateway.keys import read

    file, now = _file(workspace), time.time()
    found = [k.public(now) for k in read(file).keys.values()]
    shown = [k for k in found if every or k["state"] == "active"]
    if as_json:
        render.as_json(shown)
    elif not shown:
        render.say(f"no keys in {file}: toolkit keys create NAME makes one")
    else:
        columns = (
            "name", "id", "tenant", "class", "models", "requests/min", "tokens/min", "expires", "state"
        )  # fmt: skip
        render.table(columns, [_row(k) for k in shown])


@keys.command()
@click.argument("name", metavar="NAME|ID")
@workspace_option
@json_option
def revoke(name: str, workspace: Path | None, as_json: bool) -> None:
    """End a key. A running server refuses it within a second.

    \b
    Example:
      toolkit keys revoke laptop
    """
    from toolkit.gateway.keys import editing

    with editing(_file(workspace)) as known:
        key = known.revoke(name)
    if as_json:
        render.as_json(key.public(time.time()))
    else:
        render.say(f"revoked {key.name} ({key.id})")


@keys.command()
@click.argument("name", metavar="NAME|ID")
@click.option("--overlap", metavar="1d", help="Time that the old key still works. [default: none]")
@workspace_option
@json_option
def rotate(name: str, overlap: str | None, workspace: Path | None, as_json: bool) -> None:
    """Make a new key in place of one, with the same rights and lifetime, and show it, this once.

    \b
    Example:
      toolkit keys rotate laptop --overlap 1d
    """
    from toolkit.gateway.keys import editing, lifetime_s

    overlap_s = lifetime_s(overlap) if overlap else 0.0
    with editing(_file(workspace)) as known:
        key, text = known.rotate(name, overlap_s)
    _show_new(key, text, as_json)


def _file(workspace: Path | None) -> Path:
    from toolkit.workspace import Workspace

    return Workspace.locate(workspace).keys


def _fields(
    name: str,
    models: str | None,
    metrics_only: bool,
    expires: str | None,
    key_class: str | None,
    **rest: Any,
) -> dict[str, Any]:
    """What `create` was given, checked."""
    from toolkit.errors import UsageError
    from toolkit.gateway.keys import METRICS, lifetime_s
    from toolkit.recipe.base import slug

    named = [m.strip() for m in models.split(",")] if models is not None else None
    try:
        for given in (name, key_class, rest.get("tenant"), *(named or ())):
            if given is not None:
                slug(given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if metrics_only:
        if named is not None:
            raise UsageError("--metrics-only and --models exclude each other")
        named = [METRICS]
    return rest | {
        "models": None if named is None else tuple(named),
        "expires_at": time.time() + lifetime_s(expires) if expires else None,
        "key_class": key_class,
    }


def _show_new(key: Key, text: str, as_json: bool) -> None:
    if as_json:
        render.as_json(key.public(time.time()) | {"key": text})
        return
    render.hint(f"{key.name} ({key.id}), {_until(key.expires_at)}; it is shown this once:")
    render.say(text)


def _row(key: dict[str, Any]) -> list[Any]:
    models = "all" if key["models"] is None else ", ".join(key["models"])
    return [
        key["name"],
        key["id"],
        key["tenant"],
        key["key_class"],
        models,
        key["requests_per_minute"],
        key["tokens_per_minute"],
        _until(key["expires_at"]),
        key["state"],
    ]


def _until(expires_at: float | None) -> str:
    if expires_at is None:
        return "never expires"
    return f"until {time.strftime('%Y-%m-%d %H:%M', time.localtime(expires_at))}"
