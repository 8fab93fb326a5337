"""Options that several commands share, so that they are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")

workspace_option = click.option(
    "--workspace",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of artifacts and runs. [default: $TOOLKIT_WORKSPACE or ./runs]",
)

profile_option = click.option(
    "--profile",
    "--on",
    "profile",
    metavar="NAME",
    help="Where it runs: a file, or a name under jobs/profiles. [default: local]",
)

set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY.PATH=VALUE",
    multiple=True,
    help="Change one value of the recipe; the value is YAML. Repeatable.",
)

recipe_argument = click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))


here_option = click.option(
    "--profile",
    "profile",
    metavar="NAME",
    help="Whose environments this process uses: a file, or a name under jobs/profiles. [default: local]",
)

on_option = click.option(
    "--on",
    "on",
    metavar="NAME",
    help="Submit as jobs to this machine's queue, Slurm, Ray, Kubernetes: a profile's name or file.",
)

detach_option = click.option(
    "--detach", is_flag=True, help="With --on: come back at once; `toolkit jobs` shows how it goes."
)

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="With --on: print exactly what would be submitted, and stop."
)


def recipe_options(command: F) -> F:
    """RECIPE, ``--set``, ``--profile``, ``--workspace`` and ``--json``."""
    for option in (json_option, workspace_option, profile_option, set_option, recipe_argument):
        command = option(command)
    return command


def job_options(command: F) -> F:
    """RECIPE, ``--set``, ``--profile`` for here or ``--on`` for elsewhere, ``--workspace`` and ``--json``."""
    jobs = (dry_run_option, detach_option, on_option, here_option)
    for option in (json_option, workspace_option, *jobs, set_option, recipe_argument):
        command = option(command)
    return command
