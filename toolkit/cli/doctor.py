"""``toolkit doctor``: what is here, what is missing, and what mends it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, profile_option, workspace_option


@click.command()
@click.argument(
    "recipe", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=False
)
@profile_option
@workspace_option
@json_option
def doctor(recipe: Path | None, profile: str | None, workspace: Path | None, as_json: bool) -> None:
    """Say what is here, what is missing, and what mends it.

    \b
    With RECIPE: what that recipe needs. Exits with 3 when something needed is missing.

    \b
    Example:
      toolkit doctor recipes/demo/tickets.yaml
    """
    from toolkit.doctor import Verdict, examine
    from toolkit.launch import profiles
    from toolkit.workspace import Workspace

    needed, uri = _wanted(recipe)
    checks = examine(needed, Workspace.locate(workspace), profiles.load(profile), uri)
    missing = [check for check in checks if check.verdict is Verdict.missing]
    if as_json:
        render.as_json({"usable": not missing, "checks": [vars(check) for check in checks]})
    else:
        rows = [(check.verdict, check.name, check.found) for check in checks]
        render.table(("", "what", "found"), rows)
        for check in checks:
            if check.mend:
                render.say(f"{check.name}: {check.mend}")
    sys.exit(3 if missing else 0)


def _wanted(recipe: Path | None) -> tuple[tuple[str, ...], str | None]:
    """Environments that must be there, and the MLflow store the recipe names."""
    from toolkit.cli.env import DEFAULT

    if recipe is None:
        return DEFAULT, None
    from toolkit.environments.needs import recipe_environments
    from toolkit.recipe.load import load

    return recipe_environments(recipe), load(recipe).recipe.tracking.uri
