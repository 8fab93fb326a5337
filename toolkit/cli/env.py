"""``toolkit env``: list, build and use the locked environments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli import render
from toolkit.cli.options import json_option, profile_option
from toolkit.errors import NotInstalledError

if TYPE_CHECKING:
    from toolkit.environments import Built, Environment

DEFAULT = ("train", "quantize", "vllm")
"""What `env sync` builds when nothing is named."""


@click.group()
def env() -> None:
    """List, build and use the locked environments.

    \b
    Every stage runs in an environment of its own, because the libraries of training, quantization
    and serving pin versions that exclude each other. Names are logical (train, quantize, vllm,
    sglang: the lock for this machine's accelerator) or those of locks (train-cpu, vllm-cuda, ...).

    \b
    Example:
      toolkit env sync train quantize vllm
    """


@env.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the locks and which of them are built.

    \b
    Example:
      toolkit env list --json
    """
    from toolkit.environments import from_lock, lock_names

    rows = [_row(from_lock(name)) for name in lock_names() if name not in ("core", "dev")]
    if as_json:
        render.as_json(rows)
        return
    columns = ("lock", "accelerator", "python", "packages", "built", "size")
    render.table(columns, [_cells(row) for row in rows])
    render.say(f"They lie in {Path(rows[0]['path']).parent}")


@env.command()
@click.argument("names", nargs=-1, metavar="[NAMES]...")
@click.option(
    "--for",
    "recipe",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Build what this recipe needs.",
)
@profile_option
def sync(names: tuple[str, ...], recipe: Path | None, profile: str | None) -> None:
    """Build environments that are not built yet.

    \b
    Without NAMES and --for: train, quantize and vllm. What is built already costs nothing.

    \b
    Example:
      toolkit env sync --for recipes/demo/tickets.yaml
    """
    from toolkit.environments.needs import recipe_environments

    wanted = [*names, *(recipe_environments(recipe) if recipe else ())] or list(DEFAULT)
    for name in dict.fromkeys(wanted):
        _sync_one(_environment(name, profile))


@env.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="CMD...")
@profile_option
def run(name: str, command: tuple[str, ...], profile: str | None) -> None:
    """Run a command in an environment.

    \b
    Without CMD: its Python. Write -- before a command that has options of its own.

    \b
    Example:
      toolkit env run vllm -- python -c "import vllm; print(vllm.__version__)"
    """
    interpreter = _environment(name, profile).interpreter()
    program, *arguments = command or (str(interpreter.python),)
    environ = interpreter.environ()
    try:
        os.execvpe(program, [program, *arguments], environ)  # noqa: S606 - no shell is the point
    except FileNotFoundError as cause:
        raise NotInstalledError(f"environment {name!r} has no program {program!r}") from cause


def _environment(name: str, profile: str | None) -> Environment:
    """The environment of a logical name or of a lock."""
    from toolkit.environments import NAMES, from_lock, lock_names, resolve
    from toolkit.errors import UsageError
    from toolkit.registry import close_match

    if name in NAMES:
        return resolve(name, profile=_profile(profile))
    if name not in lock_names():
        known = (*NAMES, *(lock for lock in lock_names() if lock not in NAMES))
        near = close_match(name, known)
        raise UsageError(f"no environment is named {name!r}{near}", f"known: {', '.join(known)}")
    return from_lock(name)


def _profile(given: str | None) -> Any:
    if given is None:
        return None
    from toolkit.launch import profiles

    return profiles.load(given)


def _sync_one(environment: Environment) -> None:
    from toolkit.environments import sync as build

    was_ready = environment.is_ready
    line = render.ProgressLine(environment.name, every_s=5.0)
    built = build(environment, line.update)
    if built is None:
        line.close(f"nothing to build: it runs in {environment.python}")
    else:
        line.close(_summary(environment, built, was_ready))


def _summary(environment: Environment, built: Built, was_ready: bool) -> str:
    took = "already built" if was_ready else f"built in {render.duration(built.seconds)}"
    return f"{built.packages} packages, {_gib(built.size_bytes)}, {took}: {environment.path}"


def _row(environment: Environment) -> dict[str, Any]:
    """One environment for ``env list``."""
    from toolkit.environments import load_lock, read_record

    lock, built = load_lock(environment.name), read_record(environment)
    return {
        "lock": lock.name,
        "accelerator": lock.accelerator,
        "python": lock.python,
        "ready": built is not None,
        "packages": len(lock.pins),
        "size": built.size_bytes if built else None,
        "digest": lock.digest,
        "path": str(environment.path),
    }


def _cells(row: dict[str, Any]) -> list[Any]:
    built = "yes" if row["ready"] else "no"
    size = None if row["size"] is None else _gib(row["size"])
    return [row["lock"], row["accelerator"], row["python"], row["packages"], built, size]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
