"""What every engine has to keep, told by plain programs. See the issue's ten points; numbers in names are theirs."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.world import World
from toolkit.launch import actions, logs
from toolkit.launch.dispatch import hand_over
from toolkit.launch.states import State

pytestmark = pytest.mark.integration

PROGRAM = (sys.executable, "-I", str(Path(__file__).with_name("program.py")))


def told(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_1_a_chain_runs_in_order_and_says_how_it_went(world: World, tmp_path):
    said = tmp_path / "said"
    chain = world.submit((*PROGRAM, "say", said, "first"), (*PROGRAM, "say", said, "second"))
    second = world.ended(chain, 2)
    first = world.reports(chain)[0]
    assert [first.state, second.state] == [State.succeeded] * 2
    assert told(said) == [["first"], ["second"]]
    assert (first.exit_code, first.attempts, first.host) == (0, 1, os.uname().nodename)
    assert first.submitted <= first.started <= first.ended <= second.started


def test_1_a_job_that_waits_says_for_what(world: World, tmp_path):
    chain = world.submit(
        (*PROGRAM, "count", tmp_path / "a", 40, 0.1), (*PROGRAM, "say", tmp_path / "b")
    )
    world.wait(chain, State.running)
    waiting = world.reports(chain)[1]
    assert waiting.state is State.queued
    assert waiting.reason
    world.cancel(chain)


def test_3_lines_are_followed_to_the_end_and_kept(world: World, tmp_path):
    chain = world.submit((*PROGRAM, "count", tmp_path / "a", 5, 0.1))
    record = world.record(chain)
    ids = list(record["jobs"])
    followed = [line.text for line in logs.lines(world.jobs, record, ids, follow=True, tick=int)]
    assert followed == [f"counted {n}" for n in range(1, 6)]
    again = [line.text for line in logs.lines(world.jobs, record, ids, follow=False, tick=int)]
    assert again == followed


def test_4_an_uninterrupted_job_and_one_that_is_killed_five_times_end_the_same(
    world: World, tmp_path
):
    chain = world.submit((*PROGRAM, "count", tmp_path / "a", 40, 0.15), retries=1)
    chance = random.Random(5)
    for kill in range(1, 6):
        _wait_for(lambda n=kill: len(told(tmp_path / "a" / "starts")) >= n, f"start {kill}")
        pid = told(tmp_path / "a" / "starts")[-1][0]
        before = len(told(tmp_path / "a" / "counted"))
        _wait_for(lambda n=before: len(told(tmp_path / "a" / "counted")) > n, "progress")
        time.sleep(chance.random() / 2)
        os.kill(pid, chance.choice((signal.SIGKILL, signal.SIGTERM)))
    report = world.ended(chain)
    assert report.state is State.succeeded, report
    assert report.attempts == 6
    counted = [n for (n,) in told(tmp_path / "a" / "counted")]
    assert counted[-1] == 40
    repeated = len(counted) - len(set(counted))
    assert repeated <= 5  # a SIGKILL between the line and the checkpoint may repeat one number
    assert sorted(set(counted)) == list(range(1, 41))


def test_4_ahead_of_the_time_limit_it_keeps_its_state_and_goes_on(world: World, tmp_path):
    resources = {"gpus": 0, "cpus": 1, "memory_gib": None, "nodes": 1, "time_limit_s": 12}
    from toolkit.launch.spec import Resources

    chain = world.submit(
        (*PROGRAM, "count", tmp_path / "a", 60, 0.1), resources=Resources(**resources), grace_s=8
    )
    report = world.ended(chain)
    assert report.state is State.succeeded, report
    assert report.attempts >= 2
    ends = [attempt.ended for attempt in world.job(chain).attempts]
    assert {end["cause"] for end in ends[:-1]} == {"preempted"}
    assert "the time limit of 12 s was near" in ends[0]["message"]
    assert [n for (n,) in told(tmp_path / "a" / "counted")] == list(range(1, 61))


@pytest.mark.parametrize(("code", "cause"), [(1, "failed"), (2, "usage"), (3, "not_installed")])
def test_5_what_is_wrong_is_not_tried_again(world: World, code, cause):
    chain = world.submit((sys.executable, "-c", f"print('no'); raise SystemExit({code})"))
    report = world.ended(chain)
    assert (report.state, report.cause, report.exit_code) == (State.failed, cause, code)
    assert report.attempts == 1
    assert report.reason == f"its process ended with {code}: no"


def test_5_a_loss_that_gets_nowhere_ends_after_the_retries(world: World):
    chain = world.submit((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"), retries=1)
    report = world.ended(chain)
    assert (report.state, report.cause, report.attempts) == (State.failed, "lost", 2)
    assert "no try is left" in report.reason


def test_6_cancel_takes_the_whole_family_and_can_be_repeated(world: World, tmp_path):
    chain = world.submit((*PROGRAM, "family", tmp_path, 0), (*PROGRAM, "say", tmp_path / "b"))
    _wait_for(lambda: len(told(tmp_path / "pids")) == 3, "the family")
    begun = time.monotonic()
    first, second = world.cancel(chain)
    assert (first.state, second.state) == (State.cancelled, State.cancelled)
    assert time.monotonic() - begun < 45  # 30 s on a machine that is not busy
    _wait_for(lambda: not any(alive(pid) for (pid,) in told(tmp_path / "pids")), "their end", 5)
    assert [one.state for one in world.cancel(chain)] == [State.cancelled] * 2
    assert not (tmp_path / "b").exists()


def test_6_a_job_that_waits_is_cancelled_and_never_begins(world: World, tmp_path):
    chain = world.submit(
        (*PROGRAM, "count", tmp_path / "a", 99, 0.1), (*PROGRAM, "say", tmp_path / "b")
    )
    world.wait(chain, State.running)
    actions.cancel(world.jobs, {chain: [world.job(chain, 2).path.name]})
    assert world.reports(chain)[1].state is State.cancelled
    assert world.reports(chain)[0].state is State.running
    world.cancel(chain)
    assert not (tmp_path / "b").exists()


def test_7_later_jobs_are_cancelled_with_the_reason_and_a_retry_repeats_nothing(
    world: World, tmp_path
):
    said, gate = tmp_path / "said", tmp_path / "gate"
    script = f"import os, sys; sys.exit(0 if os.path.exists({str(gate)!r}) else 1)"
    chain = world.submit(
        (*PROGRAM, "say", said, 1), (sys.executable, "-c", script), (*PROGRAM, "say", said, 3)
    )
    last = world.ended(chain, 3)
    assert (last.state, last.cause) == (State.cancelled, "upstream")
    assert last.reason.startswith("step-2 failed: its process ended with 1")
    world.ended(chain, 2)
    gate.touch()
    actions.retry(world.jobs, world.record(chain))
    assert world.ended(chain, 3).state is State.succeeded
    assert told(said) == [["1"], ["3"]]
    assert [one.attempts for one in world.reports(chain)] == [1, 2, 1]


HARD = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=40)


def test_8_words_arrive_unchanged(world: World, tmp_path):
    said = tmp_path / "a b'c\"$d\nä"
    words = [
        "",
        " ",
        "a b",
        "'",
        '"',
        "$HOME",
        "`id`",
        "$(id)",
        "\\",
        "\n",
        "ünï — 日本",
        "%s",
        "#!",
        "-n",
    ]
    chain = world.submit((*PROGRAM, "say", said, *words))
    assert world.ended(chain).state is State.succeeded
    assert told(said) == [words]


def test_8_any_words_arrive_unchanged(world: World, tmp_path):
    """One job, many words: a start for each example would take minutes."""
    said, drawn = tmp_path / "said", []

    @settings(max_examples=60, database=None, suppress_health_check=list(HealthCheck))
    @given(HARD)
    def draw(word):
        drawn.append(word)

    draw()
    chain = world.submit((*PROGRAM, "say", said, *drawn))
    assert world.ended(chain).state is State.succeeded
    assert told(said) == [drawn]


def test_9_a_submission_that_was_cut_off_is_found_again(world: World, tmp_path):
    chain = world.write((*PROGRAM, "say", tmp_path / "said", "once"))
    hand_over(world.jobs / chain)
    (world.job(chain).path / "submitted.json").unlink(
        missing_ok=True
    )  # killed before it was written down
    hand_over(world.jobs / chain)
    assert world.ended(chain).state is State.succeeded
    hand_over(world.jobs / chain)
    time.sleep(1)
    assert told(tmp_path / "said") == [["once"]]


def test_10_five_hundred_queued_jobs_are_listed_in_a_second_with_one_call(
    world: World, tmp_path, monkeypatch
):
    many = World(tmp_path, world.backend, world.options)
    chains = [many.write((*PROGRAM, "say", tmp_path / "x"), name=f"n{n}") for n in range(500)]
    for chain in chains:
        many.job(chain).write(
            "submitted.json", {"id": f"unknown-{chain}", "at": time.time(), "text": ""}
        )
    calls = []
    from toolkit.launch.backend import BACKENDS

    real = BACKENDS[world.backend].seen
    monkeypatch.setattr(
        BACKENDS[world.backend], "seen", lambda self, ids: calls.append(1) or real(self, ids)
    )
    records = [many.record(chain) for chain in chains]
    begun = time.process_time()
    reports = actions.look(many.jobs, records)
    assert time.process_time() - begun < 1.0
    assert len(reports) == 500
    assert len(calls) <= 1


def _wait_for(condition, what, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(0.05)
