"""Trials of a sweep as job arrays on a real Slurm: each goes its own way, and all are asked for in one call."""

import os
import shutil
import sys
import time

import pytest

from tests.contract.test_contract import PROGRAM, told
from tests.contract.world import World
from tests.slurm.test_chains_on_slurm import aged
from tests.slurm.test_real_slurm import until
from toolkit.launch import actions, arrays, logs
from toolkit.launch.backend import backend_of
from toolkit.launch.dispatch import hand_over, hand_over_array
from toolkit.launch.folder import LOST_S
from toolkit.launch.spec import JobSpec, Resources
from toolkit.launch.states import Cause, State

pytestmark = pytest.mark.integration
PATIENCE_S = 180
FAILS = (sys.executable, "-c", "raise SystemExit(2)")


@pytest.fixture
def world(slurm, tmp_path):
    made = World(tmp_path / "it's a $workspace", "slurm", {})
    yield made
    made.close()


@pytest.fixture
def calls(slurm, tmp_path, monkeypatch):
    """The calls of Slurm's programs from here on, one a line; jobs have a path of their own."""
    log, places = tmp_path / "calls", tmp_path / "bin"
    places.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel"):
        real = shutil.which(name, path=os.environ["PATH"])
        (places / name).write_text(
            f'#!/bin/bash\necho {name} >>{log}\nPATH={slurm.environ["PATH"]} exec {real} "$@"\n'
        )
        (places / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{places}:{os.environ['PATH']}")
    return lambda: log.read_text().split() if log.exists() else []


def give(world, chains, parallel=2):
    hand_over_array([world.jobs / chain for chain in chains], parallel)


def specs(world, chain):
    return [JobSpec.read(world.jobs / chain / name) for name in world.record(chain)["jobs"]]


def slurm_id(world, chain, number=1):
    return world.reports(chain)[number - 1].engine_id.partition("@")[0]


def at_once(intervals):
    """How many of them there are at one time, at most."""
    changes = sorted(
        [(begun, 1) for _, begun, _ in intervals] + [(end, -1) for *_, end in intervals]
    )
    counts = [0]
    for _, change in changes:
        counts.append(counts[-1] + change)
    return max(counts)


def test_four_trials_are_two_submissions_and_two_run_at_once(world, calls, tmp_path):
    steps = [tmp_path / name for name in ("first", "second")]
    for step in steps:
        step.mkdir()
    chains = [world.write(*((*PROGRAM, "occupy", step, 1) for step in steps)) for _ in range(4)]
    backend = backend_of("slurm", {}, world.jobs)
    shown = list(arrays.rendered(backend, [specs(world, chain) for chain in chains], 2))
    give(world, chains)
    assert calls() == ["squeue", "sbatch", "sbatch"]
    sent = [(world.jobs / "arrays" / f"{name}.sh").read_text() for name, _, _ in shown]
    first = slurm_id(world, chains[0]).partition("_")[0]
    assert sent == [
        text.replace(f'"aftercorr:<id of {shown[0][0]}>"', f"aftercorr:{first}")
        for *_, text in shown
    ]
    records = [world.record(chain) for chain in chains]
    before = len(calls())
    reports = actions.look(world.jobs, records)
    assert calls()[before:] == ["squeue"]
    assert [one.engine_id for one in reports[::2]] == [
        f"{first}_{n}@{chain}-01-step" for n, chain in enumerate(chains)
    ]
    for chain in chains:
        report = world.ended(chain, 2, PATIENCE_S)
        assert (report.state, report.attempts) == (State.succeeded, 1)
    for step in steps:
        ran = told(step / "occupied")
        assert len(ran) == 4
        assert at_once(ran) <= 2


def test_one_that_fails_takes_only_its_own_second_step_along_and_is_tried_again_alone(
    world, slurm, tmp_path
):
    gate = tmp_path / "gate"
    code = f"import os; raise SystemExit(0 if os.path.exists({str(gate)!r}) else 2)"
    second = (*PROGRAM, "say", tmp_path / "second")
    chains = [world.write((*PROGRAM, "say", tmp_path / "first", n), (*second, n)) for n in range(3)]
    chains.append(world.write((sys.executable, "-c", code), (*second, 3)))
    give(world, chains)
    for chain in chains[:3]:
        assert world.ended(chain, 2, PATIENCE_S).state is State.succeeded
    first, after = world.ended(chains[3], 1, PATIENCE_S), world.ended(chains[3], 2, PATIENCE_S)
    assert (first.state, first.cause, first.exit_code) == (State.failed, "usage", 2)
    assert (after.state, after.cause) == (State.cancelled, Cause.upstream)
    assert after.reason.startswith("step-1 failed: its process ended with 2")
    until(lambda: world.reports(chains[3])[1].word == "CANCELLED")
    gate.touch()
    actions.retry(world.jobs, world.record(chains[3]))
    assert world.ended(chains[3], 2, PATIENCE_S).state is State.succeeded
    assert "_" not in slurm_id(world, chains[3])
    assert sorted(told(tmp_path / "second")) == [["0"], ["1"], ["2"], ["3"]]
    assert [one.attempts for one in world.reports(chains[3])] == [2, 1]


def test_one_that_slurm_requeues_goes_on_and_the_others_do_not_notice(world, slurm, tmp_path):
    chains = [
        world.write(
            (*PROGRAM, "count", tmp_path / f"{n}", 60, 0.1),
            (*PROGRAM, "say", tmp_path / "second", n),
        )
        for n in range(3)
    ]
    give(world, chains, parallel=3)
    for n in range(3):
        until(lambda n=n: len(told(tmp_path / f"{n}" / "counted")) > 3)
    slurm.ask(
        "scontrol", "requeue", slurm_id(world, chains[2])
    )  # the last task's own number may be the array's
    world.wait(chains[2], State.preempted, seconds=PATIENCE_S)
    assert world.reports(chains[2])[1].state is State.queued
    for chain in chains:
        assert world.ended(chain, 2, PATIENCE_S).state is State.succeeded
    assert [len(told(tmp_path / f"{n}" / "starts")) for n in range(3)] == [1, 1, 2]
    assert [n for (n,) in told(tmp_path / "2" / "counted")] == list(range(1, 61))
    assert sorted(told(tmp_path / "second")) == [["0"], ["1"], ["2"]]


def test_a_worker_that_is_killed_is_started_again_as_the_same_task(world, slurm, tmp_path):
    chains = [world.write((*PROGRAM, "count", tmp_path / f"{n}", 40, 0.1)) for n in range(2)]
    give(world, chains)
    for n in range(2):
        until(lambda n=n: len(told(tmp_path / f"{n}" / "counted")) > 3)
    before = [slurm_id(world, chain) for chain in chains]
    os.kill(told(tmp_path / "1" / "starts")[0][0], 9)
    for chain in chains:
        assert world.ended(chain, 1, PATIENCE_S).state is State.succeeded
    assert [slurm_id(world, chain) for chain in chains] == before
    assert [world.reports(chain)[0].attempts for chain in chains] == [1, 2]


def test_who_looks_starts_the_tasks_again_that_slurm_calls_running_for_ever(world, slurm, tmp_path):
    chains = [world.write((*PROGRAM, "count", tmp_path / f"{n}", 30, 0.1)) for n in range(2)]
    give(world, chains)
    for n in range(2):
        until(lambda n=n: len(told(tmp_path / f"{n}" / "counted")) > 3)
    before = [slurm_id(world, chain) for chain in chains]
    for pid in [*slurm.steppers(), *slurm.array_processes(before[0].partition("_")[0])]:
        os.kill(pid, 9)
    until(lambda: not slurm.steppers())
    assert {world.reports(chain)[0].word for chain in chains} == {"RUNNING"}
    for chain in chains:
        aged(world.job(chain).attempts[-1].folder / "beat", LOST_S + 1)
        assert world.reports(chain)[0].cause == Cause.lost
    for n, chain in enumerate(chains):
        report = world.ended(chain, 1, PATIENCE_S)
        assert (report.state, report.attempts) == (State.succeeded, 2)
        assert slurm_id(world, chain) == before[n]
        assert sorted({n for (n,) in told(tmp_path / f"{n}" / "counted")}) == list(range(1, 31))


def test_tasks_of_several_nodes_keep_their_attempts_apart(world, tmp_path):
    code = (
        "import os; print(os.environ['TOOLKIT_NODE'], os.environ['TOOLKIT_RENDEZVOUS'], flush=True)"
    )
    argv = (sys.executable, "-c", f"{code}; import time; time.sleep(4)")
    chains = [world.write(argv, resources=Resources(nodes=2)) for _ in range(2)]
    give(world, chains)
    meet = set()
    for chain in chains:
        report = world.ended(chain, 1, PATIENCE_S)
        assert (report.state, report.attempts) == (State.succeeded, 1)
        record = world.record(chain)
        lines = logs.lines(world.jobs, record, list(record["jobs"]), follow=False, tick=int)
        told_by = sorted((str(one.node), *one.text.split()) for one in lines)
        assert [one[:2] for one in told_by] == [("0", "0"), ("1", "1")]
        meet.add(told_by[0][2])
        assert told_by[0][2] == told_by[1][2]
    assert len(meet) == 2


def test_cancel_ends_only_the_one(world, slurm, tmp_path):
    chains = [
        world.write(
            (*PROGRAM, "count", tmp_path / f"{n}", 40, 0.1),
            (*PROGRAM, "say", tmp_path / "second", n),
        )
        for n in range(4)
    ]
    give(world, chains)
    until(lambda: told(tmp_path / "1" / "counted"))
    until(lambda: told(tmp_path / "0" / "counted"))
    running, waiting = world.cancel(chains[0]), world.cancel(chains[3])
    assert [one.state for one in (*running, *waiting)] == [State.cancelled] * 4
    for chain in chains[1:3]:
        assert world.ended(chain, 2, PATIENCE_S).state is State.succeeded
    assert sorted(told(tmp_path / "second")) == [["1"], ["2"]]
    assert not (tmp_path / "3").exists()


@pytest.mark.parametrize("again", ["together", "alone"])
def test_a_submitter_that_was_killed_leaves_neither_orphan_nor_double(
    world, calls, tmp_path, monkeypatch, again
):
    chains = [
        world.write(
            (*PROGRAM, "say", tmp_path / "first", n), (*PROGRAM, "say", tmp_path / "second", n)
        )
        for n in range(3)
    ]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # between sbatch and the first word about it
        patch.setattr("toolkit.launch.dispatch._write_down", killed)
        with pytest.raises(KeyboardInterrupt):
            give(world, chains)
    assert calls().count("sbatch") == 1
    assert not any(world.job(chain).submitted for chain in chains)
    if again == "together":
        give(world, chains)
        assert calls().count("sbatch") == 2
    else:
        for chain in chains:
            hand_over(world.jobs / chain)
    for n, chain in enumerate(chains):
        assert world.ended(chain, 2, PATIENCE_S).state is State.succeeded
        assert slurm_id(world, chain).endswith(f"_{n}")
        assert "array" in world.job(chain).submitted
    assert (
        sorted(told(tmp_path / "first"))
        == sorted(told(tmp_path / "second"))
        == [["0"], ["1"], ["2"]]
    )


def test_two_hundred_trials_are_two_submissions_and_listed_in_one_call(world, calls, tmp_path):
    many = World(tmp_path, "slurm", {"options": ["--hold"]})
    said = (*PROGRAM, "say", tmp_path / "never")
    chains = [many.write(said, said, name=f"n{n}") for n in range(200)]
    begun = time.monotonic()
    give(many, chains)
    print(f"handed over: {time.monotonic() - begun:.1f} s")
    assert [one for one in calls() if one != "squeue"] == ["sbatch"] * 2
    before, records = len(calls()), [many.record(chain) for chain in chains]
    begun = time.monotonic()
    reports = actions.look(many.jobs, records)
    print(f"listed: {time.monotonic() - begun:.1f} s")
    assert calls()[before:] == ["squeue"]
    assert {(one.state, one.word) for one in reports} == {(State.queued, "PENDING")}
    assert len({one.engine_id for one in reports}) == 400
    backend_of("slurm", {}, many.jobs).cancel([one.engine_id for one in reports])


def test_chains_of_another_shape_go_alone(world, calls, tmp_path):
    chains = [
        world.write(
            (*PROGRAM, "say", tmp_path / "first", n), (*PROGRAM, "say", tmp_path / "second", n)
        )
        for n in range(2)
    ]
    half = world.write((*PROGRAM, "say", tmp_path / "second", 2))
    give(world, [*chains, half])
    assert calls().count("sbatch") == 3
    for chain in chains:
        assert world.ended(chain, 2, PATIENCE_S).state is State.succeeded
    assert world.ended(half, 1, PATIENCE_S).state is State.succeeded
    assert "_" not in slurm_id(world, half)
    give(world, [*chains, half])
    assert calls().count("sbatch") == 3


def test_of_many_trials_those_that_failed_early_begin_no_second_step(world, slurm, tmp_path):
    """More tasks than Slurm splits for aftercorr: begun late, after all that they wait for."""
    bad = (3, 14)
    chains = [
        world.write(
            FAILS if n in bad else (*PROGRAM, "say", tmp_path / "first", n),
            (*PROGRAM, "say", tmp_path / "second", n),
        )
        for n in range(16)
    ]
    give(world, chains, parallel=8)
    for n, chain in enumerate(chains):
        after = world.ended(chain, 2, PATIENCE_S)
        assert after.state is (State.cancelled if n in bad else State.succeeded), after
        assert n not in bad or after.cause == Cause.upstream
    number = slurm_id(world, chains[0], 2).partition("_")[0]
    until(lambda: "PENDING" not in slurm.ask("squeue", "-h", "-j", number, "-o", "%T", check=False))
    assert sorted(int(n) for (n,) in told(tmp_path / "second")) == [
        n for n in range(16) if n not in bad
    ]
