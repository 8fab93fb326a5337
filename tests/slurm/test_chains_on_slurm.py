"""Whole chains through the core: what Slurm calls running for ever, what it forgot, several nodes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.contract.test_contract import PROGRAM, told
from tests.contract.world import World
from tests.slurm.test_real_slurm import until
from toolkit.launch import actions, logs
from toolkit.launch.folder import LOST_S
from toolkit.launch.spec import Resources
from toolkit.launch.states import Cause, State

pytestmark = pytest.mark.integration


@pytest.fixture
def world(slurm, tmp_path):
    made = World(tmp_path / "workspace", "slurm", {})
    yield made
    made.close()


def test_a_chain_of_a_workspace_that_was_deleted_is_not_taken_for_the_new_one(world, tmp_path):
    argv = (*PROGRAM, "say", tmp_path / "a", 1)
    for times in (1, 2):
        chain = world.submit(argv)
        assert world.ended(chain).state is State.succeeded
        assert told(tmp_path / "a") == [["1"]] * times
        until(lambda name=chain: world.reports(name)[0].word == "COMPLETED")
        shutil.rmtree(world.jobs / chain)
        world.number = 0


def number(report):
    return report.engine_id.partition("@")[0]


def aged(file, seconds):
    moment = time.time() - seconds
    os.utime(file, (moment, moment))


def test_who_looks_starts_again_what_slurm_calls_running_for_ever(world, slurm, tmp_path):
    chain = world.submit(
        (*PROGRAM, "count", tmp_path / "a", 30, 0.1), (*PROGRAM, "say", tmp_path / "b")
    )
    until(lambda: len(told(tmp_path / "a" / "counted")) > 3)
    report = world.reports(chain)[0]
    for pid in [*slurm.steppers(), *slurm.job_processes(number(report))]:
        os.kill(pid, signal.SIGKILL)
    time.sleep(2)
    before = world.reports(chain)[0]
    assert (before.state, before.word) == (State.running, "RUNNING")
    aged(world.job(chain).attempts[-1].folder / "beat", LOST_S + 1)
    lost = world.reports(chain)[0]
    assert (lost.state, lost.cause) == (State.retrying, Cause.lost)
    assert lost.reason.startswith("no heartbeat for 9")
    assert world.ended(chain, 2).state is State.succeeded
    first = world.reports(chain)[0]
    assert (first.attempts, first.engine_id) == (2, report.engine_id)
    assert sorted({n for (n,) in told(tmp_path / "a" / "counted")}) == list(range(1, 31))


@pytest.fixture
def opening(slurm):
    """The partition starts nothing until the test opens it: else a job may run before it is cancelled."""

    def become(state):
        slurm.ask("scontrol", "update", "PartitionName=main", f"State={state}")

    become("DOWN")
    yield lambda: become("UP")
    become("UP")


def test_a_job_that_slurm_forgot_while_it_waited_is_said_and_may_be_tried_again(
    world, opening, tmp_path
):
    chain = world.submit((*PROGRAM, "say", tmp_path / "a", 1))
    world.cancel(chain)
    job = world.job(chain)
    (job.path / "cancelled.json").unlink()
    job.write("submitted.json", {"id": f"99999@{job.path.name}", "at": time.time(), "text": ""})
    assert world.reports(chain)[0].state is State.queued  # not in such haste
    job.write("submitted.json", {"id": f"99999@{job.path.name}", "at": 0, "text": ""})
    report = world.reports(chain)[0]
    assert (report.state, report.cause) == (State.failed, Cause.lost)
    assert report.reason == "its engine forgot it while it waited, or somebody cancelled it there"
    assert report.hint == f"toolkit jobs retry {chain}"
    opening()
    actions.retry(world.jobs, world.record(chain))
    assert world.ended(chain).state is State.succeeded
    assert told(tmp_path / "a") == [["1"]]


def test_a_job_that_somebody_cancelled_in_slurm_is_cancelled(world, slurm, tmp_path):
    chain = world.submit((*PROGRAM, "count", tmp_path / "a", 300, 0.1))
    world.wait(chain, State.running)
    until(lambda: told(tmp_path / "a" / "counted"))
    slurm.ask("scancel", number(world.reports(chain)[0]))
    report = world.ended(chain)
    assert (report.state, report.word) == (State.cancelled, "CANCELLED")


def test_all_nodes_write_their_lines_into_one_attempt(world, tmp_path):
    code = "import os, time; print('node', os.environ['TOOLKIT_NODE'], flush=True); time.sleep(4)"
    chain = world.submit((sys.executable, "-c", code), resources=Resources(nodes=2, gpus=1))
    report = world.ended(chain)
    assert (report.state, report.attempts) == (State.succeeded, 1)
    record = world.record(chain)
    lines = logs.lines(world.jobs, record, list(record["jobs"]), follow=False, tick=int)
    assert sorted((one.node, one.text) for one in lines) == [(0, "node 0"), (1, "node 1")]


def test_cancel_takes_the_family_on_all_nodes(world, tmp_path):
    chain = world.submit((*PROGRAM, "family", tmp_path, 0), resources=Resources(nodes=2))
    until(lambda: len(told(tmp_path / "pids")) == 6)
    assert world.cancel(chain)[0].state is State.cancelled
    pids = [str(pid) for (pid,) in told(tmp_path / "pids")]
    argv = ["ps", "-o", "pid=", "-p", ",".join(pids)]
    until(lambda: subprocess.run(argv, check=False).returncode == 1, 10)
