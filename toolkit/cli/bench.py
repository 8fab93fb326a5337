"""``bench``: time to first token, time per token and throughput of an OpenAI endpoint under concurrent load."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, workspace_option

if TYPE_CHECKING:
    from toolkit.bench.load import Level, Sample
    from toolkit.engines.client import Client


class Levels(click.ParamType[tuple[int, ...]]):
    """``1,4,16``."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Read whole numbers above 0."""
        if isinstance(value, tuple):
            return value
        try:
            levels = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers like 1,4,16", param, ctx)
        if min(levels) < 1:
            self.fail(f"{value!r} has a number below 1", param, ctx)
        return levels


@click.command()
@click.option("--url", metavar="URL", help="Endpoint. [default: the workspace's only server]")
@click.option("--model", metavar="NAME", help="[default: the adapter, else the first model served]")
@click.option("--concurrency", type=Levels(), default="1,4,16", show_default=True)
@click.option(
    "--requests", type=click.IntRange(1), help="Per level. [default: 4 per client, at least 16]"
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--rows",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSONL with messages to ask, instead of made-up words.",
)
@click.option(
    "--stop-early/--ignore-eos", default=False, help="Let answers end. [default: ignore-eos]"
)
@click.option("--api-key", envvar="OPENAI_API_KEY", metavar="KEY", help="[env: OPENAI_API_KEY]")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for bench.json, samples.jsonl and bench.png.",
)
@workspace_option
@json_option
def bench(url: str | None, workspace: Path | None, as_json: bool, **options: Any) -> None:
    """Ask an OpenAI endpoint from many clients at once and time the answers.

    Answers are forced to --max-tokens (ignore_eos, which vLLM and SGLang know), so that levels
    compare; give --stop-early for other endpoints. Exit code 1 when a request failed.

    \b
    Examples:
      toolkit bench --concurrency 1,4,16
      toolkit bench --url http://127.0.0.1:8000 --model tickets --rows heldout.jsonl --output bench
    """
    from toolkit.cli.chat import _model, _running
    from toolkit.engines.client import Client

    key = options["api_key"] if url else None
    url, default = (url, None) if url else _running(None, workspace)
    client = Client(url, key)
    model = _model(client, options["model"], default)
    levels = [_level(client, model, n, options) for n in options["concurrency"]]
    _report(client, model, levels, options, as_json)


def _level(client: Client, model: str, concurrency: int, options: dict[str, Any]) -> Level:
    from toolkit.bench import prompts
    from toolkit.bench.load import measure

    count = options["requests"] or max(16, 4 * concurrency)
    asked = (
        prompts.from_rows(options["rows"], count)
        if options["rows"]
        else prompts.made(count, options["prompt_tokens"], seed=concurrency)
    )
    settings = {"max_tokens": options["max_tokens"], "temperature": 0}
    if not options["stop_early"]:
        settings["ignore_eos"] = True
    line = render.ProgressLine(f"{concurrency} clients", every_s=5)
    done: list[Sample] = []
    begin = time.monotonic()

    def moved(sample: Sample) -> None:
        done.append(sample)
        tokens = sum(s.completion_tokens for s in done)
        line.update(
            f"{len(done)}/{count} requests  {tokens / (time.monotonic() - begin):.1f} tok/s"
        )

    level = measure(client, model, asked, concurrency=concurrency, options=settings, on_done=moved)
    line.close(f"{count} requests")
    return level


def _report(
    client: Client, model: str, levels: list[Level], options: dict[str, Any], as_json: bool
) -> None:
    from toolkit.bench import report
    from toolkit.errors import EngineError, NotInstalledError

    summaries = [report.summarize(level) for level in levels]
    asked = {k: options[k] for k in ("prompt_tokens", "max_tokens", "stop_early")}
    result = {
        "url": client.root,
        "model": model,
        **asked,
        "rows": options["rows"],
        "levels": summaries,
    }
    if folder := options["output"]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(result, indent=2, default=str))
        _write_samples(levels, folder / "samples.jsonl")
        try:
            report.plot(summaries, f"{model} at {client.root}", folder / "bench.png")
        except NotInstalledError as missing:
            render.hint(f"{missing}")
    if as_json:
        render.as_json(result)
    else:
        render.table(report.COLUMNS, [report.row(summary) for summary in summaries], model)
    if failed := sum(summary["errors"] for summary in summaries):
        causes = {cause for summary in summaries for cause in summary["error_messages"]}
        raise EngineError(f"{failed} requests failed: {'; '.join(sorted(causes)[:3])}")


def _write_samples(levels: list[Level], file: Path) -> None:
    from dataclasses import asdict

    lines = [
        json.dumps({"concurrency": level.concurrency, **asdict(sample)})
        for level in levels
        for sample in level.samples
    ]
    file.write_text("".join(f"{line}\n" for line in lines))
