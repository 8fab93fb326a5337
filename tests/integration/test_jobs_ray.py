"""The Ray engine against a real Ray on this machine, with four GPUs that are not there."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.contract.test_contract import PROGRAM, _wait_for, told
from tests.contract.world import World
from tests.ray_cluster import RayCluster, ray_python
from toolkit.errors import BackendError
from toolkit.launch.folder import JobFolder
from toolkit.launch.ray.backend import Ray
from toolkit.launch.ray.seen import GAVE_UP
from toolkit.launch.spec import JobSpec, Resources
from toolkit.launch.states import Cause, State

pytestmark = [pytest.mark.integration, pytest.mark.skipif(sys.platform != "linux", reason="/proc")]
GIVES_UP_S = 30
WAITS = "import os, time; open(F, 'w').write(str(os.getpid())); time.sleep(300)"
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, 1); time.sleep(300)'])
open(F, 'w').write(f'{os.getpid()} {child.pid}'); time.sleep(300)
"""
ALL = Resources(gpus=4)


@pytest.fixture(scope="module")
def cluster():
    with RayCluster(ray_python(), start_timeout_s=GIVES_UP_S) as found:
        yield found


@pytest.fixture
def engine(cluster, tmp_path):
    found = Ray(
        {"address": cluster.address, "token": f"file:{cluster.token_file}"}, tmp_path / "jobs"
    )
    yield found
    going = [
        one for one, given in found.head.list().items() if given["status"] in ("PENDING", "RUNNING")
    ]
    found.cancel(going)
    for one in going:
        until(found, one, State.cancelled, State.failed, State.succeeded, State.retrying)


@pytest.fixture
def job(tmp_path, request):
    def made(code="pass", number=1, **changes):
        name = f"t-{abs(hash(request.node.name)) % 16**8:08x}"
        file = tmp_path / f"pids-{number}"
        given = JobSpec(
            id=f"{name}-{number:02d}-train", chain=name, step="train", stage="train",
            folder=str(tmp_path / "jobs" / str(number)), after=(),
            argv=(sys.executable, "-c", f"F = {str(file)!r}\n{code}"),
        )  # fmt: skip
        return replace(given, **changes)

    return made


def until(engine, engine_id, *states):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = engine.seen([engine_id]).get(engine_id)
        if found and found.state in states:
            return found
        time.sleep(0.2)
    raise AssertionError(f"still {found}")


def begun(engine, spec) -> list[int]:
    """Process ids that the job wrote down when it began; it is handed over again as the keeper would."""
    file = Path(spec.argv[2].partition("'")[2].partition("'")[0])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.exists() and file.read_text():
            return [int(one) for one in file.read_text().split()]
        if engine.seen([spec.id])[spec.id].state is State.retrying:
            engine.submit(spec, {})
        time.sleep(0.1)
    raise AssertionError("it did not begin")


def gone(pid) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_a_job_gets_its_gpus_its_arguments_and_variables_and_is_one_however_often_submitted(
    engine, job
):
    words, value = ("a b", "$(id)", "${HOME}", "'\"\n", "ü€😀", ""), "${HOME} $PATH\n'\""
    code = (
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['A'], os.environ['CUDA_VISIBLE_DEVICES']]))"
    )
    spec = job(code, env={"A": value}, resources=Resources(gpus=2))
    spec = replace(spec, argv=(*spec.argv, *words))
    engine_id = engine.submit(spec, {})
    assert engine.submit(spec, {}) == engine_id == spec.id
    found = until(engine, engine_id, State.succeeded)
    assert (found.exit_code, found.cause) == (0, Cause.done)
    assert found.host
    said = json.loads(list(engine.logs(spec, engine_id))[-1])
    assert said[:2] == [list(words), value]
    assert len(said[2].split(",")) == 2


def test_what_is_rendered_is_what_ray_has(engine, job):
    spec = job(resources=Resources(cpus=2, memory_gib=0.5))
    engine_id = engine.submit(spec, {})
    rendered, there = json.loads(engine.render(spec, {})), engine.head.find(engine_id)
    for key in ("submission_id", "entrypoint", "metadata", "runtime_env"):
        assert there[key] == rendered[key]
    until(engine, engine_id, State.succeeded)


def test_a_submission_whose_answer_got_lost_is_found(engine, job, monkeypatch):
    spec = job()
    sent = engine.head.find
    engine.submit(spec, {})
    monkeypatch.setattr(type(engine.head), "find", lambda *_: None)
    with pytest.raises(BackendError, match="already exists"):
        engine.head.create(engine.render(spec, {}))
    monkeypatch.undo()
    assert sent(spec.id)["submission_id"] == engine.submit(spec, {})


def test_somebody_elses_job_of_that_name_is_not_taken_for_ours(engine, job):
    spec = job()
    body = json.loads(engine.render(spec, {})) | {"metadata": {}, "entrypoint": "true"}
    engine.head.create(json.dumps(body))
    with pytest.raises(
        BackendError, match=r"has a job .* already, and it is not the toolkit's"
    ) as no:
        engine.submit(spec, {})
    assert no.value.hint.startswith(f"ray job delete {spec.id}")


def test_preempted_jobs_are_started_over_under_another_id(engine, job):
    spec = job("print('kept', flush=True); raise SystemExit(75)")
    first = engine.submit(spec, {})
    found = until(engine, first, State.preempted)
    assert (found.exit_code, found.cause, found.reason) == (75, Cause.preempted, "kept")
    JobFolder(Path(spec.folder)).next_attempt()
    second = engine.submit(spec, {})
    assert second == f"{first}-r2"
    until(engine, second, State.preempted)
    assert set(engine.seen([first, second])) == {first, second}


def test_a_job_that_ended_before_it_began_has_its_log_in_ray(engine, job):
    spec = replace(job(), argv=("/opt/no/python",))
    engine_id = engine.submit(spec, {})
    found = until(engine, engine_id, State.failed)
    assert found.exit_code == 127
    assert "/opt/no/python" in "\n".join(engine.logs(spec, engine_id))
    JobFolder(Path(spec.folder)).next_attempt().log().write_text("began")
    assert engine.logs(spec, engine_id) is None


def test_cancel_ends_the_whole_process_tree_and_can_be_repeated(engine, job, monkeypatch):
    monkeypatch.setattr("toolkit.launch.ray.render.CANCEL_S", 1)
    spec = job(STUBBORN)
    engine_id = engine.submit(spec, {})
    tree = begun(engine, spec)
    engine.cancel([engine_id])
    engine.cancel([engine_id, "never-there"])
    assert until(engine, engine_id, State.cancelled).cause is Cause.cancelled
    assert all(gone(pid) for pid in tree)
    engine.cancel([engine_id])


def test_a_job_waits_for_room_is_given_up_by_ray_and_handed_over_again(engine, job):
    running = job(WAITS, 1, resources=ALL)
    first = engine.submit(running, {})
    begun(engine, running)
    waiting = job("pass", 2, resources=ALL)
    second = engine.submit(waiting, {})
    found = until(engine, second, State.queued)
    assert "waiting for resources" in found.reason
    found = until(engine, second, State.retrying)
    assert found.word == GAVE_UP
    assert engine.submit(waiting, {}) == second
    until(engine, second, State.queued)
    engine.cancel([first])
    until(engine, second, State.succeeded)


def test_a_job_that_waits_can_be_cancelled_and_never_runs(engine, job, tmp_path):
    running = job(WAITS, 1, resources=ALL)
    first = engine.submit(running, {})
    begun(engine, running)
    second = engine.submit(job(WAITS, 2, resources=ALL), {})
    until(engine, second, State.queued)
    engine.cancel([second])
    engine.cancel([first])
    found = until(engine, second, State.cancelled, State.failed)
    assert found.state is State.cancelled
    assert not (tmp_path / "pids-2").exists()


def test_a_job_whose_watcher_is_killed_is_lost_and_leaves_nothing_running(engine, cluster, job):
    spec = job(WAITS)
    engine_id = engine.submit(spec, {})
    [pid] = begun(engine, spec)
    os.kill(cluster.supervisor_of(pid).pid, signal.SIGKILL)
    found = until(engine, engine_id, State.preempted)
    assert (found.word, found.cause) == ("JOB_SUPERVISOR_ACTOR_DIED", Cause.lost)
    assert gone(pid)


def test_a_job_whose_watcher_is_killed_goes_on_in_a_new_start(cluster, tmp_path):
    """Ray fails the job and ends its program with the actor; the keeper starts it again from what it kept."""
    world = World(
        tmp_path, "ray", {"address": cluster.address, "token": f"file:{cluster.token_file}"}
    )
    try:
        chain = world.submit((*PROGRAM, "count", tmp_path / "a", 40, 0.25))
        _wait_for(lambda: len(told(tmp_path / "a" / "counted")) > 3, "progress", 240)
        first = world.job(chain).attempts[0]
        os.kill(cluster.supervisor_of(first.started["pid"]).pid, signal.SIGKILL)
        assert gone(first.started["pid"])
        assert gone(told(tmp_path / "a" / "starts")[0][0])
        report = world.ended(chain, seconds=300)
        assert (report.state, report.attempts) == (State.succeeded, 2)
        assert report.engine_id == f"{chain}-01-step-r2"
        assert (first.ended["cause"], first.ended["kept"]) == ("lost", True)
        assert first.ended["message"].startswith("JOB_SUPERVISOR_ACTOR_DIED: ")
        counted = [n for (n,) in told(tmp_path / "a" / "counted")]
        assert sorted(set(counted)) == list(range(1, 41))
        assert len(counted) <= 41  # one line may lie between the last checkpoint and the end
    finally:
        world.close()


def test_a_wrong_token_is_refused(engine, cluster, tmp_path):
    (tmp_path / "token").write_text("wrong" * 8)
    stranger = Ray({"address": cluster.address, "token": f"file:{tmp_path / 'token'}"}, tmp_path)
    with pytest.raises(BackendError, match=r"Ray refuses \(40[13]\)") as no:
        stranger.seen(["a"])
    assert "ray.token" in no.value.hint
