"""What is known of a job after slurmctld forgot it: without accounting, and with it."""

import time

import pytest

from tests.slurm.cluster import SlurmCluster, missing
from toolkit.launch.slurm import Slurm
from toolkit.launch.slurm.client import Client
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import State

pytestmark = pytest.mark.integration


@pytest.fixture(params=[False, True], ids=["without-accounting", "with-accounting"])
def cluster(request, monkeypatch):
    reason = missing(accounting=request.param)
    if reason:
        pytest.skip(reason)
    made = SlurmCluster(accounting=request.param, min_job_age_s=2)
    try:
        made.start()
        for name, value in made.environ.items():
            monkeypatch.setenv(name, value)
        yield made
    finally:
        made.stop()


def test_a_job_is_known_after_slurmctld_forgot_it(cluster, tmp_path):
    def job(name, *argv):
        folder = tmp_path / "jobs" / "c-00000001" / name
        folder.mkdir(parents=True)
        return JobSpec(name, "c-00000001", name, "t", str(folder), (), argv)

    engine = Slurm({}, tmp_path / "jobs")
    broken = engine.submit(job("c-00000001-01-a", "bash", "-c", "exit 3"), {})
    fine = engine.submit(job("c-00000001-02-b", "true"), {})
    cancelled = engine.submit(
        job("c-00000001-03-c", "sleep", "100"), {fine.partition("@")[2]: fine}
    )
    _until(lambda: engine.seen([cancelled])[cancelled].state is State.running)
    engine.cancel([cancelled])
    _until(lambda: engine.seen([cancelled])[cancelled].state is State.cancelled)
    ids = [broken, fine, cancelled]
    _until(lambda: not Client().queue([one.partition("@")[0] for one in ids]))
    seen = engine.seen([*ids, f"{fine.partition('@')[0]}@somebody-else"])
    assert (seen[broken].state, seen[broken].exit_code) == (State.failed, 3)
    assert (seen[fine].state, seen[fine].exit_code) == (State.succeeded, 0)
    if cluster.accounting:
        assert set(seen) == set(ids)
        assert seen[cancelled].reason.startswith("CANCELLED by ")
    else:
        assert {seen[broken].word, seen[fine].word} == {"forgotten"}
    engine.cancel(ids)


def _until(wanted, seconds=120):
    end = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < end
        time.sleep(0.3)
