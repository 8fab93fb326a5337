"""Write ``docs/reference/`` and ``recipes/recipe.schema.json`` from the code.

::

    python docs/generate.py           # write
    python docs/generate.py --check   # exit 1 and name the pages that are stale
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from inspect import getdoc
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Made by docs/generate.py from the code; change it there. -->\n\n"


def cli() -> str:
    """``reference/cli.md``: every command with its help."""
    from toolkit.cli import toolkit

    intro = "`-h` works everywhere. Exit codes: see [errors](errors.md)."
    parts = ["# Command reference", "", intro, ""]
    for path, command in _commands(toolkit, "toolkit"):
        parts += [f"{'##' if path.count(' ') < 2 else '###'} `{path}`", "", *_help(path, command)]
    return "\n".join(parts).rstrip() + "\n"


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path)
        for name in command.list_commands(context):
            if inner := command.get_command(context, name):
                yield from _commands(inner, f"{path} {name}")


def _help(path: str, command: click.Command) -> Iterator[str]:
    from toolkit.cli import CONTEXT

    context = click.Context(command, info_name=path, terminal_width=100, **CONTEXT)
    text = command.get_help(context)
    yield "```text"
    yield from (line.rstrip() for line in text.splitlines())
    yield "```"
    yield ""


def recipe() -> str:
    """``reference/recipe.md``."""
    from toolkit.recipe import schema

    return schema.reference()


def profiles() -> str:
    """``reference/profiles.md``: keys of a profile, and the shipped ones."""
    from toolkit.launch.profiles import Profile
    from toolkit.recipe import schema

    intro = (
        "A profile is one YAML file that says where a recipe runs. `--on NAME` takes a shipped one by\n"
        "name, or a file by its path. Unknown keys are errors."
    )
    text = schema.reference(Profile, "Profile reference", intro)
    shipped = sorted((ROOT / "jobs" / "profiles").glob("*.yaml"))
    pages = [f"## Shipped: `{p.stem}`\n\n```yaml\n{p.read_text().rstrip()}\n```\n" for p in shipped]
    return "\n".join([text, *pages])


def errors() -> str:
    """``reference/errors.md``: the tree of errors with exit codes."""
    from toolkit.errors import ToolkitError

    lines = [
        "# Errors and exit codes",
        "",
        "An error says what is wrong and where; its hint says what to do. Results go to standard output,",
        "errors to standard error.",
        "",
        "| exit code | meaning |",
        "| --- | --- |",
        "| 0 | everything that was asked for is done |",
        "| 1 | work was tried and failed, or a gate did not pass |",
        "| 2 | the recipe or the command is wrong; nothing was started |",
        "| 3 | an environment, a program or a package is missing |",
        "| 130 | stopped with Ctrl-C |",
        "",
        "| error | exit code | meaning |",
        "| --- | --- | --- |",
    ]
    kinds = (ToolkitError, *ToolkitError.__subclasses__())
    rows = (f"| `{k.__name__}` | {k.exit_code} | {_first_paragraph(k)} |" for k in kinds)
    return "\n".join([*lines, *rows]) + "\n"


def _first_paragraph(kind: type) -> str:
    paragraph = " ".join((getdoc(kind) or "").split("\n\n")[0].split())
    return paragraph.replace("``", "`").replace("|", "\\|")


def preflight() -> str:
    """``reference/preflight.md``: every rule, and which engine loads what."""
    from toolkit.preflight import RULES
    from toolkit.preflight.formats import SUPPORT

    says = {"ok": "yes", "warn": "yes, but", "refuse": "no"}
    return "\n".join(
        [
            "# Preflight rules",
            "",
            "`toolkit plan`, and every command that runs something, checks these first: without a GPU,",
            "without torch, in milliseconds. A recipe that breaks one is refused with exit code 2 and",
            "the fix. Where a rule says that something works, but not as one may think, it warns.",
            "",
            "| rule | what must hold | where this was learned |",
            "| --- | --- | --- |",
            *(f"| `{r.id}` | {r.must} | {r.source} |" for r in RULES),
            "",
            "## Which engine loads what",
            "",
            "| engine | accelerator | versions | weights | loads | why | where this was learned |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(
                f"| {s.engine} | {s.accelerator} | {_versions(s.since, s.until)} | {s.format} "
                f"| {says[s.outcome]} | {s.why} | {s.source} |"
                for s in SUPPORT
            ),
            "",
        ]
    )


def _versions(since: tuple[int, ...], until: tuple[int, ...]) -> str:
    if since:
        return f"from {'.'.join(map(str, since))}"
    return "all" if until[0] > 1000 else f"before {'.'.join(map(str, until))}"


def schema() -> str:
    """``recipes/recipe.schema.json``."""
    from toolkit.recipe import schema as schemas

    return schemas.text()


PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/cli.md": cli,
    "docs/reference/recipe.md": recipe,
    "docs/reference/profiles.md": profiles,
    "docs/reference/errors.md": errors,
    "docs/reference/preflight.md": preflight,
    "recipes/recipe.schema.json": schema,
}
"""File -> what makes it."""


def render(name: str) -> str:
    """The text that the file should have."""
    return (NOTE if name.endswith(".md") else "") + PAGES[name]()


def main(arguments: list[str]) -> int:
    """Write all pages, or check them; the number of stale pages decides the exit code of a check."""
    check = "--check" in arguments
    texts = {name: render(name) for name in PAGES}
    stale = [n for n, t in texts.items() if not (ROOT / n).is_file() or (ROOT / n).read_text() != t]
    for name in stale:
        print(f"{'stale' if check else 'wrote'}: {name}")
        if not check:
            (ROOT / name).write_text(texts[name])
    if check and stale:
        print("run: make docs")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
