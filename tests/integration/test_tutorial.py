"""The tutorial's page can be followed: its commands are read from it, in order.

``console`` blocks are run line by line where a line starts with ``$ ``; other lines are output and are not
compared. A block after ``<!-- test: skip, REASON -->`` is left out. Commands that take the tutorial's recipe are
given settings on top, so that a test takes minutes; the page itself stays the real thing. That they work is tested in
``test_recipe_to_served.py``, which has a run of the same recipe at hand.
"""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorials" / "first-model.md"

RECIPE = "first.yaml"
TAKES_A_RECIPE = ("plan", "run", "train", "export", "quantize", "evaluate", "serve")
COMMAND_TIMEOUT_S = 1500

BLOCK = re.compile(
    r"(?P<skip><!-- test: skip,[^>]*-->\n\n)?```console\n(?P<body>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


def commands(page: str) -> list[str]:
    """Commands of a page, in order."""
    return [
        line.removeprefix("$ ")
        for block in BLOCK.finditer(page)
        if not block["skip"]
        for line in block["body"].splitlines()
        if line.startswith("$ ")
    ]


def shortened(command: str, settings: tuple[str, ...]) -> list[str]:
    """The words of a command, with the settings where it takes the recipe."""
    words = shlex.split(command)
    if words[0] == "toolkit" and words[1] in TAKES_A_RECIPE and RECIPE in words:
        return [*words, *(w for setting in settings for w in ("--set", setting))]
    return words


def follow(folder: Path, settings: tuple[str, ...]) -> dict[str, str]:
    """Run all commands of the page in a folder; what each said."""
    here = folder / "bin" / "toolkit"
    here.parent.mkdir()
    here.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m toolkit "$@"\n')
    here.chmod(here.stat().st_mode | stat.S_IXUSR)
    environ = os.environ | {"PATH": f"{here.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environ.pop("TOOLKIT_WORKSPACE", None)
    said: dict[str, str] = {}
    try:
        for command in commands(PAGE.read_text()):
            done = subprocess.run(
                shortened(command, settings), cwd=folder, env=environ,
                capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
            )  # fmt: skip
            said[command] = done.stdout
            assert done.returncode == 0, (
                f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
    finally:
        subprocess.run(
            [here, "serve", "--stop"], cwd=folder, env=environ, capture_output=True, check=False
        )
    return said


def test_commands_are_found_in_order_and_skipped_blocks_are_not():
    page = "```console\n$ a 1\noutput\n$ b\n```\n<!-- test: skip, why -->\n\n```console\n$ c\n```\n```yaml\n$ d\n```\n"
    assert commands(page) == ["a 1", "b"]


def test_only_commands_on_the_recipe_are_shortened():
    assert shortened("toolkit runs list", ("a=1",)) == ["toolkit", "runs", "list"]
    assert shortened(f"toolkit train {RECIPE}", ("a=1",))[2:] == [RECIPE, "--set", "a=1"]


def test_the_tutorial_leads_from_a_recipe_to_a_served_model():
    verbs = [shlex.split(c)[1] for c in commands(PAGE.read_text())]
    order = ["init", "validate", "plan", "train", "evaluate", "serve", "chat", "runs"]
    assert [v for v in dict.fromkeys(verbs) if v in order] == order
