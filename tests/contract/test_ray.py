"""What a Ray cluster does to jobs, seen through to their end by the keeper."""

import os
import signal

import pytest

from tests.contract.engines import ENGINES
from tests.contract.test_contract import PROGRAM, _wait_for, told
from toolkit.launch.states import State

pytestmark = pytest.mark.integration


def test_a_job_whose_watcher_is_killed_goes_on_under_another(tmp_path, request):
    world = ENGINES["ray"](tmp_path, request)
    try:
        chain = world.submit((*PROGRAM, "count", tmp_path / "a", 80, 0.1))
        _wait_for(lambda: len(told(tmp_path / "a" / "counted")) > 3, "progress", 120)
        pid = told(tmp_path / "a" / "starts")[0][0]
        os.kill(world.cluster.supervisor_of(pid).pid, signal.SIGKILL)
        report = world.ended(chain, seconds=240)
        assert (report.state, report.attempts) == (State.succeeded, 2)
        counted = [n for (n,) in told(tmp_path / "a" / "counted")]
        assert sorted(set(counted)) == list(range(1, 81))
        assert len(counted) - len(set(counted)) <= 1
    finally:
        world.close()
