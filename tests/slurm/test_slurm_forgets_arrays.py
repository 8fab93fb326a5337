"""More trials than Slurm looks at one by one, and a Slurm that forgets what they wait for while they wait."""

import os
import sys

import pytest

from tests.contract.test_contract import PROGRAM, told
from tests.contract.world import World
from tests.slurm.test_slurm_forgets import _until, cluster
from toolkit.launch import actions
from toolkit.launch.dispatch import hand_over_array
from toolkit.launch.slurm.client import Client
from toolkit.launch.slurm.render_array import SPLIT
from toolkit.launch.spec import Resources
from toolkit.launch.states import Cause, State

pytestmark = pytest.mark.integration
__all__ = ["cluster"]  # a fixture
MANY = SPLIT + 4
MENDED, BROKEN = SPLIT + 1, SPLIT + 2
WHOLE = Resources(cpus=4, nodes=2)
PATIENCE_S = 180


@pytest.fixture
def world(cluster, tmp_path):
    made = World(tmp_path / "workspace", "slurm", {})
    yield made
    made.close()


def slurm_ids(world, chains, number=1):
    return [world.reports(chain)[number - 1].engine_id.partition("@")[0] for chain in chains]


def forgotten(numbers):
    return lambda: not Client().queue(numbers)


@pytest.mark.parametrize("cluster", [False], indirect=True)
def test_a_trial_begins_its_second_step_after_slurm_forgot_its_first(cluster, world, tmp_path):
    """The first ten wait; the last ones are done, two of them badly; people try one again meanwhile."""
    first, second, gate = (tmp_path / name for name in ("first", "second", "gate"))
    code = f"import os; raise SystemExit(0 if os.path.exists({str(gate)!r}) else 2)"
    odd = {
        MENDED: (sys.executable, "-c", code),
        BROKEN: (sys.executable, "-c", "raise SystemExit(2)"),
    }
    blocker = world.submit((*PROGRAM, "count", tmp_path, 9999, 0.1), resources=WHOLE)
    world.wait(blocker, State.running)
    chains = [
        world.write(odd.get(n, (*PROGRAM, "say", first, n)), (*PROGRAM, "say", second, n))
        for n in range(MANY)
    ]
    hand_over_array([world.jobs / chain for chain in chains], 8)
    firsts, seconds = slurm_ids(world, chains), slurm_ids(world, chains, 2)
    for one in firsts[:SPLIT]:
        cluster.ask("scontrol", "hold", one)
    world.cancel(blocker)
    _until(lambda: len(told(first)) == MANY - SPLIT - len(odd))
    for n in odd:
        assert world.ended(chains[n], 2, PATIENCE_S).cause == Cause.upstream
    _until(forgotten(firsts[SPLIT:-1]))  # the last record of an array stays with it
    assert world.reports(chains[SPLIT])[0].state is State.succeeded
    assert [row.word for row in Client().queue([seconds[MENDED]])] == ["PENDING"]
    gate.touch()
    actions.retry(world.jobs, world.record(chains[MENDED]))
    assert world.ended(chains[MENDED], 2, PATIENCE_S).state is State.succeeded
    assert "PENDING" not in [row.word for row in Client().queue([seconds[MENDED]])]
    for one in firsts[:SPLIT]:
        cluster.ask("scontrol", "release", one)
    for n, chain in enumerate(chains):
        assert n == BROKEN or world.ended(chain, 2, PATIENCE_S).state is State.succeeded
    _until(forgotten(seconds))
    last = world.reports(chains[BROKEN])
    assert [(one.state, one.attempts) for one in last] == [(State.failed, 1), (State.cancelled, 0)]
    assert sorted(int(n) for (n,) in told(second)) == [n for n in range(MANY) if n != BROKEN]


@pytest.mark.parametrize("cluster", [True], indirect=True)
def test_tasks_that_were_cancelled_while_they_waited_are_known_after_slurm_forgot_them(
    cluster, world, tmp_path
):
    chains = [world.write((*PROGRAM, "say", tmp_path / "a", n)) for n in range(4)]
    world.wait(
        world.submit((*PROGRAM, "count", tmp_path, 9999, 0.1), resources=WHOLE), State.running
    )
    hand_over_array([world.jobs / chain for chain in chains], 2)
    numbers = slurm_ids(world, chains)
    assert {world.reports(chain)[0].state for chain in chains} == {State.queued}
    cluster.ask("scancel", numbers[0].partition("_")[0])
    assert {world.reports(chain)[0].state for chain in chains} == {State.cancelled}
    _until(forgotten(numbers))
    assert {world.reports(chain)[0].word for chain in chains} == {f"CANCELLED by {os.getuid()}"}
    for chain in chains:
        world.cancel(chain)
