"""Tests that need torch run in the stages' own environments, by the pytest that is locked there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.stages import Interpreter

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def interpreter_of(name: str) -> Interpreter:
    """The environment of the stage, or what ``TOOLKIT_TEST_<NAME>_PYTHON`` names."""
    if given := os.environ.get(f"TOOLKIT_TEST_{name.upper()}_PYTHON"):
        return Interpreter(Path(given))
    from toolkit.environments import resolve

    return resolve(name, accelerator="cpu").interpreter()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["train"])
def test_in(name):
    python = interpreter_of(name)
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    done = subprocess.run(
        [python.python, "-m", "pytest", *options, f"tests/integration/in_{name}"],
        cwd=ROOT,
        env=python.environ() | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
