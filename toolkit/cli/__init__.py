"""The ``toolkit`` command: a lazy Click group. This file holds the table of commands and the only catch.

A command's module is imported when the command runs, so that ``toolkit --help`` stays fast:
nothing here, and nothing at the top of any ``cli`` module but click and the standard library, may
import pydantic, yaml, mlflow or torch.
"""

from __future__ import annotations

import sys
from importlib import import_module

import click

from toolkit import __version__
from toolkit.errors import Interrupted, ToolkitError

COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("toolkit.cli.recipes:init", "Start a recipe of your own from a shipped one."),
    "recipes": ("toolkit.cli.recipes:recipes", "List, show and copy the shipped recipes."),
    "validate": (
        "toolkit.cli.recipes:validate",
        "Check recipes; every mistake at once, with its line.",
    ),
    "schema": ("toolkit.cli.recipes:schema", "Print the JSON Schema of recipes, for editors."),
    "plan": ("toolkit.cli.plan:plan", "Show what would run, what is done, and why."),
    "run": ("toolkit.cli.run:run", "Run a recipe from data to served model."),
    "train": ("toolkit.cli.run:train", "Run a recipe as far as training."),
    "export": ("toolkit.cli.run:export", "Run a recipe as far as the exported folders."),
    "quantize": ("toolkit.cli.run:quantize", "Run a recipe as far as its quantized models."),
    "evaluate": (
        "toolkit.cli.run:evaluate",
        "Run a recipe as far as its evaluations, and check its gates.",
    ),
    "serve": ("toolkit.cli.serve:serve", "Serve a model of a recipe; stop a detached server."),
    "keys": ("toolkit.cli.keys:keys", "Make, list, revoke and rotate API keys."),
    "dashboards": (
        "toolkit.cli.dashboards:dashboards",
        "Copy the Grafana dashboard and the Prometheus alerts.",
    ),
    "adapters": (
        "toolkit.cli.adapters:adapters",
        "Change the adapters of a running server; put them into the registry.",
    ),
    "manifests": (
        "toolkit.cli.manifests:manifests",
        "Write manifests of a server for KServe, production-stack or Ray.",
    ),
    "chat": ("toolkit.cli.chat:chat", "Talk to a served model."),
    "bench": ("toolkit.cli.bench:bench", "Measure an OpenAI endpoint under concurrent load."),
    "env": ("toolkit.cli.env:env", "List, build and use the locked environments."),
    "jobs": ("toolkit.cli.jobs:jobs", "List, follow, cancel and retry what `run --on` submitted."),
    "sweep": ("toolkit.cli.sweep:sweep", "Run a recipe with many values, and find the best."),
    "sweeps": ("toolkit.cli.sweeps:sweeps", "List, show, cancel and retry sweeps."),
    "runs": ("toolkit.cli.runs:runs", "List and show MLflow runs."),
    "ui": ("toolkit.cli.runs:ui", "Open the MLflow UI on the right store."),
    "doctor": (
        "toolkit.cli.doctor:doctor",
        "Say what is here, what is missing, and what mends it.",
    ),
}
"""Command -> (module:attribute, the line in ``toolkit --help``)."""

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command, or fail with the nearest name."""
        if cmd_name not in COMMANDS:
            from toolkit.registry import close_match

            ctx.fail(f"no command is named {cmd_name!r}{close_match(cmd_name, COMMANDS)}")
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="toolkit")
def toolkit() -> None:
    """Fine-tune an open LLM, quantize it, serve it, and know that what is served is what was trained.

    \b
    Example:
      toolkit run recipes/demo/tickets.yaml
    """


def main() -> None:
    """Entry point: the only place that turns errors into text and exit codes."""
    try:
        toolkit(prog_name="toolkit", standalone_mode=False)
    except ToolkitError as error:
        from toolkit.cli import render

        render.error(error)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
