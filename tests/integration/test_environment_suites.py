"""Tests of code that needs another environment's libraries: pytest runs them in that environment."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from toolkit.environments import from_lock, sync

pytestmark = pytest.mark.integration

PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments")
"""Pure Python, all of it, so that locks of stages need not hold a test runner."""


@pytest.fixture
def lent_pytest(tmp_path: Path) -> Path:
    """A folder for ``PYTHONPATH`` with this environment's pytest and nothing else."""
    for name in PYTEST:
        (tmp_path / name).symlink_to(Path(find_spec(name).origin).parent)
    return tmp_path


def test_quantizers_and_evaluation_in_the_quantize_environment(lent_pytest: Path):
    environment = from_lock("quantize-cpu")
    sync(environment)
    interpreter = environment.interpreter()
    suite = Path(__file__).with_name("in_quantize")
    options = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "--show-capture=no"]
    done = subprocess.run(
        [interpreter.python, "-m", "pytest", *options, suite],
        env=interpreter.environ() | {"PYTHONPATH": str(lent_pytest)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
