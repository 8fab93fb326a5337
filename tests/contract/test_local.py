"""What is particular to this machine: places, and a keeper that may be killed at any moment."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.contract.test_contract import PROGRAM, _wait_for, alive, told
from tests.contract.world import World
from toolkit.launch import keeper_process
from toolkit.launch.locks import is_held
from toolkit.launch.spec import Resources
from toolkit.launch.states import State

pytestmark = pytest.mark.integration

ONE_GPU, TWO_GPUS = Resources(gpus=1), Resources(gpus=2)


def test_never_two_jobs_on_one_gpu_not_even_from_two_workspaces(local: World, tmp_path):
    other = World(tmp_path / "other", "local", local.options)
    try:
        jobs = [
            (world, resources)
            for world in (local, other)
            for resources in (ONE_GPU, ONE_GPU, TWO_GPUS)
        ]
        chains = [
            (world, world.submit((*PROGRAM, "occupy", tmp_path, 1.0), resources=resources))
            for world, resources in jobs
        ]
        assert {world.ended(chain).state for world, chain in chains} == {State.succeeded}
    finally:
        other.close()
    spans = [
        (set(gpus.split(",")), begun, ended) for gpus, begun, ended in told(tmp_path / "occupied")
    ]
    assert sorted(len(gpus) for gpus, _, _ in spans) == [1, 1, 1, 1, 2, 2]
    for n, (gpus, begun, ended) in enumerate(spans):
        for others, start, end in spans[n + 1 :]:
            assert not gpus & others or ended <= start or end <= begun


def test_a_job_that_this_machine_can_never_hold_fails_at_once(local: World):
    chain = local.submit(("true",), resources=Resources(gpus=3))
    report = local.ended(chain)
    assert (report.state, report.cause) == (State.failed, "usage")
    assert report.reason == "it asks for 3 GPUs, and this machine has 2 for jobs"


def _kill_keepers(world: World) -> bool:
    """Kill those that are seen, and whether none is left: one that is about to begin is not seen at once."""
    for pid in world.keepers():
        os.kill(pid, signal.SIGKILL)
    return not world.keepers() and not is_held(keeper_process.place(world.jobs) / "lock")


def test_a_killed_keeper_ends_no_job_and_the_next_one_starts_none_twice(local: World, tmp_path):
    chain = local.submit(
        (*PROGRAM, "count", tmp_path / "a", 150, 0.1), (*PROGRAM, "say", tmp_path / "said", "after")
    )
    local.wait(chain, State.running)
    for _ in range(2):
        _wait_for(lambda: keeper_process.ensure(local.jobs) or local.keepers(), "keeper")
        _wait_for(lambda: _kill_keepers(local), "end of the keeper")
        assert local.reports(chain)[0].state is State.running
    assert keeper_process.ensure(local.jobs)  # any `toolkit jobs` command does this
    assert local.ended(chain, 2).state is State.succeeded
    assert len(told(tmp_path / "a" / "starts")) == 1
    assert [n for (n,) in told(tmp_path / "a" / "counted")] == list(range(1, 151))
    assert told(tmp_path / "said") == [["after"]]


def test_a_killed_shim_is_found_by_its_lock_and_the_job_goes_on(local: World, tmp_path):
    chain = local.submit((*PROGRAM, "count", tmp_path / "a", 30, 0.2))
    local.wait(chain, State.running)
    _wait_for(lambda: len(told(tmp_path / "a" / "counted")) > 2, "progress")
    os.kill(local.job(chain).attempts[0].started["pid"], signal.SIGKILL)
    assert local.ended(chain).state is State.succeeded
    assert [n for (n,) in told(tmp_path / "a" / "counted")] == list(range(1, 31))
    assert len(told(tmp_path / "a" / "starts")) == 2


def test_after_everything_was_killed_what_waited_and_what_ran_is_there_again(
    local: World, tmp_path
):
    """A reboot, as far as a test can have one: every process of the workspace is gone at once."""
    running = local.submit((*PROGRAM, "count", tmp_path / "a", 30, 0.1))
    waiting = [local.submit((*PROGRAM, "say", tmp_path / "said", n)) for n in range(5)]
    _wait_for(lambda: len(told(tmp_path / "a" / "counted")) > 2, "progress")
    _wait_for(lambda: _kill_keepers(local), "end of the keeper")
    begun = local.job(running).attempts[0].started
    worker = told(tmp_path / "a" / "starts")[0][0]
    for pid in (worker, begun["pid"]):
        os.kill(pid, signal.SIGKILL)
    _wait_for(lambda: not alive(worker), "end")
    assert keeper_process.ensure(local.jobs)
    assert local.ended(running).state is State.succeeded
    assert {local.ended(chain).state for chain in waiting} == {State.succeeded}
    assert sorted(word for (word,) in told(tmp_path / "said")) == ["0", "1", "2", "3", "4"]


def test_secrets_arrive_and_are_not_written_down(local: World, tmp_path):
    secret = tmp_path / "token"
    secret.write_text("s3cret\n")
    script = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(os.environ['TOKEN'])"
    chain = local.submit((sys.executable, "-c", script), secrets={"TOKEN": f"file:{secret}"})
    assert local.ended(chain).state is State.succeeded
    assert (tmp_path / "seen").read_text() == "s3cret"
    kept = [
        path for path in local.jobs.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()
    ]
    assert kept == []


def test_a_missing_secret_is_named(local: World):
    chain = local.submit(("true",), secrets={"TOKEN": "file:/nowhere/token"})
    report = local.ended(chain)
    assert (report.state, report.cause) == (State.failed, "usage")
    assert report.reason == "secret TOKEN: /nowhere/token: No such file or directory"


def test_what_is_submitted_is_what_render_shows(local: World):
    chain = local.submit(("true",))
    local.ended(chain)
    from toolkit.launch.local import Local

    spec = local.job(chain).spec
    shown = Local(local.options, local.jobs).render(spec, {})
    assert local.job(chain).submitted["text"] == shown
    assert json.loads(shown)["argv"] == list(spec.argv)


def test_the_log_of_a_program_that_cannot_start_is_the_reason(local: World):
    chain = local.submit(("true",), argv=("/nowhere/python", "-m", "toolkit.launch.shim"))
    report = local.ended(chain)
    assert report.state is State.failed
    assert "/nowhere/python" in report.reason
    assert Path(report.folder).is_dir()
