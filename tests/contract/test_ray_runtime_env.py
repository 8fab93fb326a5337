"""Nodes of Ray without the toolkit: Ray installs the core's lock there, and the job runs in it."""

import pytest

from tests.contract.engines import ENGINES
from tests.contract.test_contract import told
from toolkit.environments.lockfile import load_lock
from toolkit.launch.states import State

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # pip installs some hundred packages

SAYS = """
import json, sys
from importlib.metadata import version
json.dump([sys.executable, {name: version(name) for name in sys.argv[2:]}], open(sys.argv[1], "w"))
"""
PACKAGES = ("dbos", "pydantic", "mlflow-skinny")


@pytest.fixture
def world(tmp_path, request):
    made = ENGINES["ray"](tmp_path, request)
    made.options["runtime_env"], made.python = "lock", "python"
    yield made
    made.close()


def test_a_job_runs_in_what_ray_made_of_the_lock(world, tmp_path):
    seen = tmp_path / "seen"
    program = ("python", "-c", SAYS, seen, *PACKAGES)
    chain = world.submit(program)
    report = world.ended(chain, seconds=600)
    assert report.state is State.succeeded, report
    [[python, versions]] = told(seen)
    assert "/runtime_resources/pip/" in python
    pins = load_lock("core").pins
    assert versions == {name: pins[name] for name in PACKAGES}
