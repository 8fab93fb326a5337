"""``init``, ``recipes``, ``validate`` and ``schema``: commands about recipes that run nothing."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, set_option

START_FROM = "demo/tickets"


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default="recipe.yaml")
@click.option(
    "--from", "source", default=START_FROM, show_default=True, help="Shipped recipe to start from."
)
def init(path: Path, source: str) -> None:
    """Start a recipe of your own at PATH from a shipped one, with the files it needs beside it.

    \b
    Example:
      toolkit init my/recipe.yaml --from demo/tickets
    """
    for written in _copy(source, path):
        render.say(f"wrote {written}")
    render.say(f"next: toolkit plan {path}")


@click.group()
def recipes() -> None:
    """List, show and copy the shipped recipes.

    \b
    Example:
      toolkit recipes list
    """


@recipes.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List the shipped recipes.

    \b
    Example:
      toolkit recipes list --json
    """
    from toolkit import resources
    from toolkit.recipe.load import load

    found = {name: load(path).recipe for name, path in resources.recipes().items()}
    if as_json:
        render.as_json(
            [
                {"name": n, "description": r.description, "path": str(resources.recipes()[n])}
                for n, r in found.items()
            ]
        )
    else:
        render.table(("recipe", "description"), [(n, r.description) for n, r in found.items()])


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a shipped recipe, comments and all.

    \b
    Example:
      toolkit recipes show demo/tickets
    """
    render.say(_shipped(name).read_text().rstrip())


@recipes.command()
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path), required=False)
def copy(name: str, path: Path | None) -> None:
    """Copy a shipped recipe to PATH, with the files it needs beside it.

    \b
    Example:
      toolkit recipes copy demo/tickets tickets.yaml
    """
    for written in _copy(name, path or Path(f"{Path(name).name}.yaml")):
        render.say(f"wrote {written}")


def _shipped(name: str) -> Path:
    from toolkit import resources
    from toolkit.errors import UsageError
    from toolkit.registry import close_match

    known = resources.recipes()
    if name not in known:
        raise UsageError(
            f"no shipped recipe is named {name!r}{close_match(name, known)}", "toolkit recipes list"
        )
    return known[name]


def _copy(name: str, path: Path) -> list[Path]:
    """Copy a recipe and the small local files it names; nothing is overwritten."""
    from toolkit.errors import UsageError
    from toolkit.observe import local_files
    from toolkit.recipe.load import load

    source = _shipped(name)
    beside = {
        text for text, _ in local_files(load(source).recipe) if (source.parent / text).is_file()
    }
    pairs = [
        (source, path),
        *((source.parent / text, path.parent / text) for text in sorted(beside)),
    ]
    taken = [str(target) for _, target in pairs if target.exists()]
    if taken:
        raise UsageError(
            f"already there: {', '.join(taken)}; nothing was written",
            "choose another path, or remove it",
        )
    for origin, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        text = origin.read_text()
        # The schema's relative address holds only inside the repository; a copy asks the command instead.
        first, _, rest = text.partition("\n")
        target.write_text(rest if first.startswith("# yaml-language-server") else text)
    return [target for _, target in pairs]


@click.command()
@click.argument("paths", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@set_option
@json_option
def validate(paths: tuple[Path, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    """Check recipes (files, or folders searched for .yaml): every mistake at once, with its line.

    Looks at no machine: a recipe is judged for the kind of machine that suits it best. `plan` also
    looks at data files, environments and the GPU.

    \b
    Example:
      toolkit validate recipes/
    """
    from toolkit.errors import PreflightError, Problem, RecipeError
    from toolkit.preflight import Outcome, Verdict, at_best
    from toolkit.recipe.load import load

    problems: list[Problem] = []
    spoken: list[tuple[Path, Verdict]] = []
    files = [file for path in paths for file in _files(path)]
    for file in files:
        try:
            loaded = load(file, overrides)
        except RecipeError as error:
            problems += error.problems
            continue
        verdicts = at_best(loaded.recipe, loaded.directory)
        spoken += [(file, v) for v in verdicts if v.outcome is not Outcome.ok]
    if as_json:
        broken = [{"where": p.where, "path": p.path, "message": p.message} for p in problems]
        render.as_json(broken + [{"where": str(f), "path": "", **v.as_json()} for f, v in spoken])
    else:
        for file, verdict in spoken:
            if verdict.outcome is Outcome.warn:
                render.hint(f"warning: {file}: {verdict}")
    if problems:
        raise RecipeError(problems)
    refused = [f"{f}: {v}" for f, v in spoken if v.outcome is Outcome.refuse]
    if refused:
        raise PreflightError("\n".join(refused), "mend the recipe; `toolkit plan` says more")
    if not as_json:
        render.say(f"{len(files)} {'recipe is' if len(files) == 1 else 'recipes are'} valid")


def _files(path: Path) -> list[Path]:
    """A recipe, or all below a folder; a folder without any is a mistake, not a success (think of CI)."""
    from toolkit.errors import UsageError

    files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"no .yaml file is in {path}", "name a recipe, or a folder that has some")
    return files


@click.command()
@click.option("--reference", is_flag=True, help="Print the field reference as Markdown instead.")
def schema(reference: bool) -> None:
    """Print the JSON Schema of recipes; editors that know it complete keys and mark mistakes.

    \b
    Example:
      toolkit schema > recipe.schema.json
    """
    from toolkit.recipe import schema as schemas

    if reference:
        render.say(schemas.reference())
    else:
        render.as_json(schemas.json_schema())
