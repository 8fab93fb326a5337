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
    """``reference/preflight.md``: every rule, what engines do with what, and what compares them."""
    parts = (_rules(), _features(), _formats(), _adapters_on_quantized(), _layouts(), _requests())
    return "\n".join([*PREFLIGHT, *(line for part in parts for line in part)])


PREFLIGHT = (
    "# Preflight rules",
    "",
    "`toolkit plan`, and every command that runs something, checks these first: without a GPU,",
    "without torch, in milliseconds. A recipe that breaks one is refused with exit code 2 and",
    "the fix. Where a rule says that something works, but not as one may think, it warns.",
    "`toolkit plan --json` has every verdict with rule, outcome, message, hint and source;",
    "`toolkit validate` judges recipes apart from any machine.",
    "",
    "The last column of a table names engines that a test gives the fixtures of",
    "`tests/unit/preflight_cases`, to compare what they do with what preflight says:",
    "`vllm 0.32.0 cpu` in `tests/integration`, `vllm 0.26.0 cuda` and `sglang 0.5.17 cuda` in",
    "`tests/gpu`.",
    "Seen to agree: vLLM 0.32.0 on a CPU in every test run; vLLM 0.26.0 and SGLang 0.5.17 on an H200 on",
    "2026-11-22. vLLM 0.32.0 and SGLang 0.5.23 on a GPU: read in their source, not compared.",
    "",
)


def _rules() -> Iterator[str]:
    from toolkit.preflight import RULES

    yield "| rule | what must hold | what to do | where this was learned | compared with |"
    yield "| --- | --- | --- | --- | --- |"
    for r in RULES:
        yield f"| `{r.id}` | {r.must} | {r.fix} | {r.source} | {', '.join(r.tried)} |"
    yield ""


def _features() -> Iterator[str]:
    """One row per feature, engine and versions."""
    from toolkit.preflight.features import FEATURES, ROWS
    from toolkit.preflight.versions import span

    yield "## What engines do with adapters"
    yield ""
    yield "All but what is served right is refused by preflight."
    yield ""
    yield "| the adapter | engine | versions | what the engine does | what to do | source | compared with |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for r in ROWS:
        said = FEATURES[r.feature].message.partition("{")[0].rstrip(" :,")
        fix = "" if r.does == "serves it right" else r.fix
        yield (
            f"| {said} (`{r.feature}`) | {r.engine} | {span(r.since, r.until)} | {r.does} | {fix} "
            f"| {r.source} | {', '.join(r.tried)} |"
        )
    yield ""


def _formats() -> Iterator[str]:
    from toolkit.preflight.formats import ALTERNATIVE, SUPPORT
    from toolkit.preflight.versions import span

    says = {"ok": "yes", "warn": "yes, but", "refuse": "no"}
    yield "## Which engine loads what"
    yield ""
    yield "| engine | accelerator | versions | weights | loads | why | what to do | source | compared with |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for s in SUPPORT:
        place = s.accelerator if s.below is None else f"{s.accelerator} below {s.below:.1f}"
        fix = "" if s.outcome == "ok" else ALTERNATIVE[s.format]
        yield (
            f"| {s.engine} | {place} | {span(s.since, s.until)} | {s.format} | {says[s.outcome]} "
            f"| {s.why} | {fix} | {s.source} | {', '.join(s.tried)} |"
        )
    yield ""


def _adapters_on_quantized() -> Iterator[str]:
    from toolkit.preflight.formats import ADAPTERS

    yield "Adapters go onto quantized weights of every format that loads:"
    yield ""
    yield "| engine | how, by its source | seen |"
    yield "| --- | --- | --- |"
    for engine, source, seen in ADAPTERS:
        yield f"| {engine} | {source} | {seen or 'read, not tried'} |"
    yield ""


def _layouts() -> Iterator[str]:
    from toolkit.preflight.layouts import LIMITS
    from toolkit.preflight.versions import span

    yield "## Layouts of quantized weights that an engine has no fast code for"
    yield ""
    yield "| engine | accelerator | versions | method | what is not loaded | what to do | source |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for x in LIMITS:
        slow = " (loads, slowly)" if x.is_slow else ""
        yield (
            f"| {x.engine} | {x.accelerator or 'all'} | {span(x.since, x.until)} | {x.method} "
            f"| {_filled(x.message)}{slow} | {x.fix} | {x.source} |"
        )
    yield ""


def _requests() -> Iterator[str]:
    from toolkit.preflight.requests import ASKS, ROWS
    from toolkit.preflight.versions import span

    yield "## Requests that an engine cannot answer"
    yield ""
    yield "The front refuses them with 400 and the code `not_supported`; on other engines they pass."
    yield ""
    yield "| the client asks for | engine | accelerator | versions | what the engine does | source | seen on |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for r in ROWS:
        adapters = ", with room for adapters" if r.lora else ""
        yield (
            f"| {ASKS[r.asks]} | {r.engine} | {r.accelerator}{adapters} | {span(r.since, r.until)} "
            f"| {r.does} | {r.source} | {', '.join(r.tried)} |"
        )
    yield ""


def engines() -> str:
    """``reference/engines.md``: typed options of serving and the flags that they become."""
    from toolkit.engines.conflicts import CONFLICTS
    from toolkit.engines.flags import Flags
    from toolkit.engines.options import OPTIONS
    from toolkit.engines.parsers import known_versions

    def cell(how: Flags) -> str:
        return " ".join(f"`{name}`" for name in how.names)

    known = {
        engine: ", ".join(".".join(map(str, version)) for version in known_versions(engine))
        for engine in ("vllm", "sglang")
    }
    return "\n".join(
        [
            "# Options of the engines",
            "",
            "Keys of `serve` and the flags that they become. What has no key goes into `serve.extra_args` as it",
            f"is. Flags are held to the engines' own parsers: vLLM {known['vllm']}, SGLang {known['sglang']}.",
            "",
            "`engine: auto` lets preflight judge the recipe for both engines and takes the one that would not be",
            "refused; then the one that knows the model's architecture, then the one whose environment is built,",
            "then vLLM. `toolkit plan` says which, and why.",
            "",
            "| key of `serve` | vLLM | SGLang |",
            "| --- | --- | --- |",
            *(
                f"| `{o.key}` | {cell(o.engines['vllm'])} | {cell(o.engines['sglang'])} |"
                for o in OPTIONS
            ),
            "",
            "## What does not go together",
            "",
            "| engine | key | why | what to do | where this is said |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {c.engine or 'both'} | `{c.key}` | {c.text} | {c.fix} | {c.source} |"
                for c in CONFLICTS
            ),
            "",
        ]
    )


def _filled(message: str) -> str:
    """Letters in place of the layout's own values."""
    return message.format(bits="N", group="N", symmetric="S", reordered="")


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
    "docs/reference/engines.md": engines,
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
