"""Help is fast, light, complete, and stands in golden files."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from toolkit.cli import COMMANDS, toolkit

GOLDEN = Path(__file__).parents[1] / "golden" / "help"

FORBIDDEN = ("pydantic", "yaml", "mlflow", "torch", "rich", "numpy")


def commands(
    group: click.Group = toolkit, prefix: tuple[str, ...] = ()
) -> dict[tuple[str, ...], click.Command]:
    """Every command and subcommand by its words."""
    found: dict[tuple[str, ...], click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found[(*prefix, name)] = command
        if isinstance(command, click.Group):
            found |= commands(command, (*prefix, name))
    return found


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['toolkit', '--help']\n"
        "from toolkit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"import json; print(json.dumps([m for m in {FORBIDDEN!r} if m in sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stderr) == []


def test_command_modules_import_nothing_heavy():
    modules = sorted({target.partition(":")[0] for target, _ in COMMANDS.values()})
    script = "import sys\n" + "".join(f"import {m}\n" for m in modules)
    script += f"print([m for m in {FORBIDDEN!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def cpu_s(*arguments: str) -> float:
    """CPU seconds of a Python process, the best of five: other work adds to it through the caches."""

    def once() -> float:
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        return usage.ru_utime + usage.ru_stime

    return min(once() for _ in range(5))


def test_help_costs_little_more_than_click_itself():
    """The absolute figure, under 150 ms of CPU on an idle machine, is measured in benchmarks/."""
    assert cpu_s("-m", "toolkit", "--help") < 1.6 * cpu_s("-c", "import click")


@pytest.mark.parametrize("words", sorted(commands()), ids=" ".join)
def test_every_command_has_short_help_and_an_example(words):
    result = CliRunner().invoke(toolkit, [*words, "-h"], prog_name="toolkit")
    assert result.exit_code == 0, result.output
    assert "Example" in result.output
    assert "\\b" not in result.output  # Click's mark, left unread by a raw docstring
    assert f"toolkit {' '.join(words)}" in result.output


@pytest.mark.parametrize("words", [(), *sorted(commands())], ids=lambda w: " ".join(w) or "toolkit")
def test_help_is_as_recorded(words):
    """``TOOLKIT_RECORD=1 pytest tests/cli`` records anew."""
    result = CliRunner().invoke(toolkit, [*words, "-h"], prog_name="toolkit", terminal_width=100)
    file = GOLDEN / ("-".join(("toolkit", *words)) + ".txt")
    if os.environ.get("TOOLKIT_RECORD"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(result.output)
    assert result.output == file.read_text()


def test_no_golden_file_is_left_over():
    known = {"-".join(("toolkit", *words)) + ".txt" for words in [(), *commands()]}
    assert {p.name for p in GOLDEN.glob("*.txt")} == known


def test_an_unknown_command_names_the_nearest():
    done = subprocess.run(
        [sys.executable, "-m", "toolkit", "tran"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no command is named 'tran' (did you mean 'train'?)" in done.stderr


def test_the_table_of_commands_names_what_exists():
    for name, (target, _) in COMMANDS.items():
        module, _, attribute = target.partition(":")
        assert getattr(importlib.import_module(module), attribute).name == name
