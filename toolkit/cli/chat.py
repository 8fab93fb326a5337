"""``chat``: talk to a served model, answers streamed as they come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, workspace_option

if TYPE_CHECKING:
    from toolkit.engines.client import Client


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option(
    "--url", metavar="URL", help="Endpoint. [default: the server of RECIPE or the only one]"
)
@click.option("--model", metavar="NAME", help="[default: the adapter, else the first model served]")
@click.option("--message", "-m", metavar="TEXT", help="Ask once, print the answer, and end.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), help="[default: the model's own]")
@click.option(
    "--api-key", envvar="OPENAI_API_KEY", metavar="KEY", help="Sent to --url. [env: OPENAI_API_KEY]"
)
@workspace_option
@json_option
def chat(recipe: Path | None, as_json: bool, **options: Any) -> None:
    """Talk to the server of RECIPE, to the only one that runs, or to --url.

    /reset forgets the conversation; /quit, Ctrl-D or Ctrl-C at the prompt end it; Ctrl-C breaks
    off an answer.

    \b
    Examples:
      toolkit chat
      toolkit chat --url http://127.0.0.1:8000 --model tickets -m "My invoice is wrong."
    """
    from toolkit.engines.client import Client
    from toolkit.errors import UsageError

    message, url = options["message"], options["url"]
    if as_json and message is None:
        raise UsageError("--json needs --message", 'toolkit chat --json -m "Hello"')
    if url is None:
        url, default = _running(recipe, options["workspace"])
        client = Client(url)
    else:
        client, default = Client(url, options["api_key"]), None
    model = _model(client, options["model"], default)
    settings: dict[str, Any] = {"max_tokens": options["max_tokens"]}
    if options["temperature"] is not None:
        settings["temperature"] = options["temperature"]
    opening = [{"role": "system", "content": options["system"]}] if options["system"] else []
    if message is None:
        _converse(client, model, opening, settings)
        return
    _ask_once(client, model, [*opening, {"role": "user", "content": message}], settings, as_json)


def _running(recipe: Path | None, workspace: Path | None) -> tuple[str, str]:
    """URL and model of the workspace's server."""
    from toolkit.engines import records
    from toolkit.workspace import Workspace

    name = None
    if recipe is not None:
        from toolkit.recipe.load import load

        loaded = load(recipe, ()).recipe
        name = (loaded.serve.name if loaded.serve else None) or loaded.name
    record = records.pick(Workspace.locate(workspace).servers, name)
    return record.url, list(record.models.values())[-1]


def _model(client: Client, wanted: str | None, default: str | None) -> str:
    from toolkit.errors import UsageError
    from toolkit.registry import close_match

    if default and wanted is None:
        return default
    served = client.models()
    if wanted is None:
        return served[0]
    # SGLang lists BASE and ADAPTER but is asked for BASE:ADAPTER.
    if wanted not in served and wanted.partition(":")[0] not in served:
        raise UsageError(
            f"{client.root} serves no model {wanted!r}{close_match(wanted, served)}",
            f"it serves {', '.join(served)}",
        )
    return wanted


def _ask_once(
    client: Client,
    model: str,
    messages: list[dict[str, Any]],
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    if not as_json:
        _stream(client, model, messages, settings)
        return
    reply = client.chat(model, messages, **settings)
    render.as_json(
        {
            "model": model,
            "answer": reply.text,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "seconds": round(reply.seconds, 3),
        }
    )


def _converse(
    client: Client, model: str, opening: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    render.hint(f"{model} at {client.root}; /reset forgets, /quit ends")
    messages = list(opening)
    while (text := _typed()) is not None:
        if text == "/reset":
            messages = list(opening)
        elif text:
            messages.append({"role": "user", "content": text})
            messages.append(
                {"role": "assistant", "content": _stream(client, model, messages, settings)}
            )


def _typed() -> str | None:
    """A line of the user, or ``None`` at the end."""
    try:
        text = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        render.say()
        return None
    return None if text in ("/quit", "/exit") else text


def _stream(
    client: Client, model: str, messages: list[dict[str, Any]], settings: dict[str, Any]
) -> str:
    """Print the answer as it comes; Ctrl-C breaks it off and keeps what came."""
    parts: list[str] = []
    try:
        for delta in client.stream(model, messages, **settings):
            parts.append(delta.text)
            click.echo(delta.text, nl=False)
    except KeyboardInterrupt:
        render.hint(" (broken off)")
    click.echo()
    return "".join(parts)
