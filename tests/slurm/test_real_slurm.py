"""Jobs on a real Slurm: ordered, stopped and started again, forgotten and found; nothing changed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from toolkit.errors import BackendError
from toolkit.launch.folder import JobFolder, write
from toolkit.launch.slurm import Slurm
from toolkit.launch.slurm.client import Client
from toolkit.launch.spec import JobSpec, Resources
from toolkit.launch.states import State

pytestmark = pytest.mark.integration
PATIENCE_S = 120
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
NAME = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=40
)
PROGRAM = Path(__file__).parent / "job.py"


@pytest.fixture
def engine(slurm, tmp_path):
    return Slurm({}, tmp_path / "jobs")


@pytest.fixture
def make(tmp_path):
    """A job of this program; ``make("a", "--until-told")``."""
    number = iter(range(1, 99))

    def made(name, *argv, **changes):
        job_id = f"{tmp_path.name.replace('_', '-')[:24]}-{next(number):02}-{name}"
        folder = tmp_path / "jobs" / "chain" / job_id
        folder.mkdir(parents=True)
        spec = JobSpec(
            id=job_id,
            chain="chain",
            step=name,
            stage="train",
            folder=str(folder),
            after=(),
            argv=(sys.executable, "-P", str(PROGRAM), *argv),
            grace_s=10,
        )
        return replace(spec, **changes)

    return made


def wait(engine, engine_id, *states, word=None, seconds=PATIENCE_S):
    """Until the job is in one of these states; what Slurm says of it then."""
    end = time.monotonic() + seconds
    while True:
        seen = engine.seen([engine_id]).get(engine_id)
        if seen and seen.state in states and word in (None, seen.word):
            return seen
        assert time.monotonic() < end, seen
        time.sleep(0.3)


def said(job):
    """What its processes wrote: one line each."""
    path = Path(job.folder) / "said.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(wanted, seconds=PATIENCE_S):
    end = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < end
        time.sleep(0.2)


def events(job):
    return [line["event"] for line in said(job)]


# --- one job ---------------------------------------------------------------------------------------------------------


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(
    ["it's", "$HOME `id` \\", "a\r\n#SBATCH --hold\n", "é😀\x1b[0m", ""], "\n$x", "a 'b' %j \\ \n#"
)
@given(values=st.lists(TEXT, max_size=12), variable=TEXT, folder=NAME)
def test_arguments_variables_and_folders_arrive_unchanged(  # noqa: PLR0917 - pytest gives them by name
    engine, make, tmp_path, values, variable, folder
):
    place = tmp_path / "odd" / str(time.time_ns()) / folder
    try:
        place.mkdir(parents=True)
    except OSError:  # such as ".", or more bytes than a name may have
        return
    job = replace(make("a", "--tell", *values), folder=str(place), env={"VALUE": variable})
    job = replace(job, id=f"{job.id}-{time.time_ns()}"[-40:])
    engine_id = engine.submit(job, {})
    wait(engine, engine_id, State.succeeded)
    (told,) = said(job)
    assert told["argv"] == values
    assert told["variables"]["VALUE"] == variable
    assert told["folder"] == str(place)
    assert (place / "slurm.txt").exists()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example("a \"b\" 'c' # d \\ $e")
@example("# all")
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_sbatch_reads_back_exactly_what_stands_in_an_option(slurm, tmp_path, value):
    engine = Slurm({"options": [f"--network={value}", "--hold"]}, tmp_path)
    job = JobSpec("o", "c", "s", "t", str(tmp_path), (), ("true",))
    number = Client().sbatch(engine.render(job, {}), tmp_path)
    told = slurm.ask("scontrol", "show", "job", "-o", number)
    assert f" Network={value} Command=" in told


def test_a_job_tells_its_exit_code_its_host_and_its_gpus(engine, make):
    job = make("a", "--exit", "3", resources=Resources(gpus=2, cpus=2, memory_gib=0.5))
    seen = wait(engine, engine.submit(job, {}), State.failed)
    assert (seen.word, seen.reason, seen.exit_code) == ("FAILED", "NonZeroExitCode", 3)
    assert seen.host in ("fake0", "fake1")
    told = said(job)[0]
    assert told["variables"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert told["variables"]["TOOLKIT_ENGINE_ID"].endswith(f"@{job.id}")
    assert JobFolder(Path(job.folder)).path.joinpath("slurm.json").exists()


def test_nothing_of_the_submitters_environment_slips_in(engine, make, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("SBATCH_GRES", "gpu:2")
    job = make("a")
    wait(engine, engine.submit(job, {}), State.succeeded)
    variables = said(job)[0]["variables"]
    assert "HF_TOKEN" not in variables
    assert "CUDA_VISIBLE_DEVICES" not in variables


def test_a_setup_line_that_fails_ends_the_job_with_its_code(slurm, make, tmp_path):
    engine = Slurm({"setup": ["export FIRST=1", "echo no such key; (exit 9)"]}, tmp_path / "jobs")
    job = make("a")
    seen = wait(engine, engine.submit(job, {}), State.failed)
    assert (seen.exit_code, seen.reason) == (9, "NonZeroExitCode: no such key")
    assert said(job) == []


def test_a_module_that_is_not_there_is_not_installed(slurm, make, tmp_path):
    engine = Slurm({"modules": ["cuda/99"]}, tmp_path / "jobs")
    job = make("a")
    assert wait(engine, engine.submit(job, {}), State.failed).exit_code == 3
    assert "module" in (Path(job.folder) / "slurm.txt").read_text()


def test_a_program_starts_in_its_container(slurm, make, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "apptainer"
    program.write_text(
        '#!/bin/bash\nexport BOX="$*"\nuntil [[ $1 == *.sif ]]; do shift; done\nshift; exec "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    box = {"engine": "apptainer", "image": "/images/a b.sif", "mounts": ["/data:/data:ro"]}
    engine = Slurm({"container": box}, tmp_path / "jobs")
    job = make("a", "--tell", "it's", resources=Resources(gpus=1))
    wait(engine, engine.submit(job, {}), State.succeeded)
    (told,) = said(job)
    assert told["argv"] == ["it's"]
    assert told["variables"]["BOX"].startswith(
        f"exec --nv --bind {tmp_path}:{tmp_path} --bind /data:/data:ro /images/a b.sif"
    )


def test_a_refusal_comes_in_slurms_words(slurm, make, tmp_path):
    job = make("a", resources=Resources(gpus=7))
    with pytest.raises(BackendError) as caught:
        Slurm({}, tmp_path).submit(job, {})
    assert "Requested node configuration is not available" in caught.value.message
    assert caught.value.hint == "no node has so much: sinfo -o '%P %c %m %G'"
    with pytest.raises(BackendError) as caught:
        Slurm({"partition": "none"}, tmp_path).submit(job, {})
    assert "nvalid partition" in caught.value.message
    assert "sinfo -s" in caught.value.hint
    fits = replace(job, resources=Resources())
    engine = Slurm({}, tmp_path)
    wait(engine, engine.submit(fits, {}), State.succeeded)


# --- a chain ---------------------------------------------------------------------------------------------------------


def test_a_chain_runs_in_order_and_the_rest_of_a_broken_one_never_starts(engine, make):
    first = make("a", "--sleep", "2")
    second, third, fourth = make("b", "--exit", "1"), make("c"), make("d")
    ids = {first.id: engine.submit(first, {})}
    ids[second.id] = engine.submit(second, ids)
    ids[third.id] = engine.submit(third, {second.id: ids[second.id]})
    ids[fourth.id] = engine.submit(fourth, {third.id: ids[third.id]})
    waits = engine.seen([ids[second.id]])[ids[second.id]]
    assert (waits.state, waits.reason) == (State.queued, "Dependency")
    assert wait(engine, ids[second.id], State.failed).exit_code == 1
    for job in (third, fourth):
        ended = wait(engine, ids[job.id], State.cancelled)
        assert (ended.reason, ended.exit_code) == ("DependencyNeverSatisfied", None)
        assert said(job) == []
    assert said(first)[-1]["at"] <= said(second)[0]["at"]


def test_a_second_submission_finds_the_first(engine, make):
    job = make("a", "--sleep", "3")
    engine_id = engine.submit(job, {})
    assert engine.submit(job, {}) == engine_id
    wait(engine, engine_id, State.succeeded)
    # Whoever submitted died before the id was written down: it is found though it has ended.
    assert engine.submit(job, {}) == engine_id
    assert events(job) == ["started", "ended"]


def test_what_people_want_tried_again_is_a_new_job(engine, make):
    job = make("a", "--exit", "1")
    engine_id = engine.submit(job, {})
    wait(engine, engine_id, State.failed)
    write(Path(job.folder) / "retried.json", {"round": 2, "before": 0})
    again = engine.submit(job, {})
    assert again != engine_id
    assert engine.submit(job, {}) == again
    wait(engine, again, State.failed)


def test_a_job_does_not_wait_for_one_that_is_done_and_forgotten(engine, make):
    """As after a retry of a chain: Slurm knows the first job no more."""
    done, job = make("a"), make("b")
    write(JobFolder(Path(done.folder)).next_attempt().folder / "ended.json", {"cause": "done"})
    wait(engine, engine.submit(job, {done.id: f"99999@{done.id}"}), State.succeeded)


# --- stopped, and started again --------------------------------------------------------------------------------------


def resumes(job):
    """It was told once, kept its work, and the second start went on to the end."""
    told = [line for line in said(job) if line["event"] == "told"]
    starts = [line for line in said(job) if line["event"] == "started"]
    assert told
    assert [line["variables"]["SLURM_RESTART_COUNT"] for line in starts[1:]] == ["1"]
    assert events(job)[-1] == "ended"


def test_a_requeued_job_is_told_and_goes_on(engine, slurm, make):
    job, after = make("a", "--until-told"), make("b")
    engine_id = engine.submit(job, {})
    after_id = engine.submit(after, {job.id: engine_id})
    until(lambda: "started" in events(job))
    slurm.ask("scontrol", "requeue", engine_id.partition("@")[0])
    wait(engine, engine_id, State.preempted)
    assert engine.seen([after_id])[after_id].state is State.queued
    wait(engine, engine_id, State.succeeded)
    wait(engine, after_id, State.succeeded)
    resumes(job)


def test_a_more_urgent_job_takes_the_place(engine, slurm, make, tmp_path):
    job = make("a", "--until-told", resources=Resources(cpus=4, nodes=2))
    engine_id = engine.submit(job, {})
    until(lambda: events(job).count("started") == 2)
    urgent = make("b", "--sleep", "2", resources=Resources(cpus=4))
    urgent_id = Slurm({"partition": "urgent"}, tmp_path).submit(urgent, {})
    wait(engine, urgent_id, State.succeeded)
    wait(engine, engine_id, State.succeeded)
    assert said(urgent)[-1]["at"] < said(job)[-1]["at"]
    assert events(job).count("told") >= 2


def test_ahead_of_the_time_limit_it_is_told(engine, make):
    job = make("a", "--until-told", resources=Resources(time_limit_s=60))
    engine_id = engine.submit(job, {})
    wait(engine, engine_id, State.succeeded, seconds=200)
    resumes(job)
    assert next(line for line in said(job) if line["event"] == "told")["signal"] == "SIGUSR1"


def test_all_nodes_are_told_and_meet_at_the_first(engine, slurm, make):
    job = make("a", "--until-told", resources=Resources(gpus=1, cpus=2, nodes=2))
    engine_id = engine.submit(job, {})
    until(lambda: events(job).count("started") == 2)
    slurm.ask("scancel", "--batch", "--signal=USR1", engine_id.partition("@")[0])
    wait(engine, engine_id, State.succeeded)
    starts = [line["variables"] for line in said(job) if line["event"] == "started"]
    assert sorted(one["TOOLKIT_NODE"] for one in starts) == ["0", "0", "1", "1"]
    number = int(engine_id.partition("@")[0])
    assert {one["TOOLKIT_RENDEZVOUS"] for one in starts} == {f"127.0.0.1:{20000 + number % 5000}"}
    assert {one["TOOLKIT_START"] for one in starts} == {f"{number}.0", f"{number}.1"}


def test_a_program_that_sigkill_ended_is_started_again(engine, make):
    job = make("a", "--until-told")
    engine_id = engine.submit(job, {})
    until(lambda: "started" in events(job))
    os.kill(said(job)[0]["pid"], signal.SIGKILL)
    wait(engine, engine_id, State.succeeded)
    assert events(job) == ["started", "started", "ended"]


# --- what Slurm forgets ----------------------------------------------------------------------------------------------


def test_a_job_whose_slurmstepd_was_killed_frees_those_after_it(engine, slurm, make):
    """Slurm calls it RUNNING for ever; the script sees that nobody watches it any more, and says so."""
    job, after = make("a", "--sleep", "4"), make("b")
    broken, never = make("c", "--sleep", "4", "--exit", "1"), make("d")
    ids = {one.id: engine.submit(one, {}) for one in (job, broken)}
    after_id = engine.submit(after, {job.id: ids[job.id]})
    never_id = engine.submit(never, {broken.id: ids[broken.id]})
    until(lambda: events(job) and events(broken))
    for pid in slurm.steppers():
        os.kill(pid, signal.SIGKILL)
    wait(engine, after_id, State.succeeded)
    assert wait(engine, never_id, State.cancelled).reason == "DependencyNeverSatisfied"


def test_a_lost_job_that_slurm_calls_running_is_started_again_by_a_submission(engine, slurm, make):
    job = make("a", "--until-told")
    engine_id = engine.submit(job, {})
    until(lambda: "started" in events(job))
    attempt = JobFolder(Path(job.folder)).next_attempt()
    attempt.beat()
    write(attempt.folder / "started.json", {"start": f"{engine_id.partition('@')[0]}.0"})
    assert engine.submit(job, {}) == engine_id
    for pid in [*slurm.steppers(), *slurm.job_processes(engine_id.partition("@")[0])]:
        with_kill(pid)
    time.sleep(3)
    assert engine.seen([engine_id])[engine_id].word == "RUNNING"
    os.utime(attempt.folder / "beat", (0, 0))
    assert engine.submit(job, {}) == engine_id
    until(lambda: engine.seen([engine_id])[engine_id].word != "RUNNING")
    until(lambda: len(events(job)) >= 2)
    assert engine.submit(job, {}) == engine_id  # the old beat is not the new start's
    wait(engine, engine_id, State.succeeded)
    assert events(job) == ["started", "started", "ended"]


def with_kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_a_job_whose_node_dies_runs_on_the_other(engine, slurm, make):
    job = make("a", "--until-told", resources=Resources(cpus=1))
    engine_id = engine.submit(job, {})
    until(lambda: "started" in events(job))
    node = engine.seen([engine_id])[engine_id].host
    slurm.kill(node)
    for pid in [*slurm.steppers(), *slurm.job_processes(engine_id.partition("@")[0])]:
        with_kill(pid)
    try:
        seen = wait(engine, engine_id, State.succeeded)
    finally:
        slurm.start_node(node)
    assert seen.host != node
    assert events(job) == ["started", "started", "ended"]


def test_a_number_that_slurm_gave_twice_is_not_the_lost_job(engine, slurm, make):
    """A killed slurmctld goes on from what it saved: a job acknowledged after that never was."""
    kept = slurm.folder / "kept"
    slurm.stop_controller()
    shutil.copytree(slurm.folder / "state", kept)
    slurm.start_controller()
    lost, other = make("a", "--sleep", "60"), make("b", "--sleep", "2")
    lost_id = engine.submit(lost, {})
    slurm.ask("scontrol", "hold", lost_id.partition("@")[0], check=False)
    slurm.kill("slurmctld")
    shutil.rmtree(slurm.folder / "state")
    kept.rename(slurm.folder / "state")
    slurm.start_controller()
    other_id = engine.submit(other, {})
    assert other_id.partition("@")[0] == lost_id.partition("@")[0]
    assert list(engine.seen([lost_id, other_id])) == [other_id]
    engine.cancel([lost_id])
    wait(engine, other_id, State.succeeded)
    again = engine.submit(lost, {})
    assert again not in (lost_id, other_id)


# --- ended -----------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_leaves_no_process_and_is_not_started_again(engine, slurm, make):
    job, after = make("a", "--until-told", "--child"), make("b")
    engine_id = engine.submit(job, {})
    after_id = engine.submit(after, {job.id: engine_id})
    until(lambda: "started" in events(job))
    number = engine_id.partition("@")[0]
    assert len(slurm.job_processes(number)) >= 3
    engine.cancel([engine_id])
    engine.cancel([engine_id, "99999@nobody"])
    wait(engine, engine_id, State.cancelled, seconds=30)
    assert slurm.job_processes(number) == []
    engine.cancel([engine_id])
    wait(engine, after_id, State.cancelled)
    assert engine.seen([engine_id])[engine_id].state is State.cancelled


def test_a_job_is_cancelled_while_it_waits(engine, make):
    job = make("a", resources=Resources(cpus=4, nodes=2))
    blocker = engine.submit(make("b", "--sleep", "60", resources=Resources(cpus=4, nodes=2)), {})
    wait(engine, blocker, State.running)
    engine_id = engine.submit(job, {})
    assert engine.seen([engine_id])[engine_id].state is State.queued
    engine.cancel([engine_id])
    wait(engine, engine_id, State.cancelled)
    engine.cancel([blocker])
    assert said(job) == []


def test_five_hundred_jobs_that_wait_are_one_call(engine, slurm, make, tmp_path, monkeypatch):
    base = make("a")
    places = Slurm({"options": ["--hold"]}, tmp_path / "jobs")

    def submit(n):
        job = replace(base, id=f"many-{n:03}")
        return f"{Client().sbatch(places.render(job, {}), Path(job.folder))}@{job.id}"

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(submit, range(500)))
    counting = tmp_path / "bin" / "squeue"
    counting.parent.mkdir()
    real = shutil.which("squeue", path=os.environ["PATH"])
    counting.write_text(f'#!/bin/bash\necho >>{tmp_path}/calls\nexec {real} "$@"\n')
    counting.chmod(0o755)
    monkeypatch.setenv("PATH", f"{counting.parent}:{os.environ['PATH']}")
    begun = time.monotonic()
    seen = engine.seen(ids)
    print(f"500 jobs: {time.monotonic() - begun:.2f} s")
    assert {one.state for one in seen.values()} == {State.queued}
    assert {one.reason for one in seen.values()} == {"JobHeldUser"}
    assert len(seen) == 500
    assert (tmp_path / "calls").read_text() == "\n"
    engine.cancel(ids)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_normal_user_submits(slurm, tmp_path):
    place = Path(f"/tmp/{tmp_path.name}-{os.getpid()}")
    place.mkdir()
    shutil.chown(place, 65534)
    code = (
        "import sys; from pathlib import Path; from toolkit.launch.slurm import Slurm;"
        "from toolkit.launch.spec import JobSpec;"
        f"job = JobSpec('u', 'c', 's', 't', '{place}', (), ('/usr/bin/id', '-u'));"
        "print(Slurm({}, Path(job.folder)).submit(job, {}))"
    )
    try:
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
        done = subprocess.run([*argv, "-c", code], capture_output=True, text=True, check=False)
        if "ermission denied" in done.stderr:
            pytest.skip("another user cannot read the code here")
        assert done.returncode == 0, done.stderr
        wait(Slurm({}, place), done.stdout.strip(), State.succeeded)
        assert (place / "slurm.txt").read_text() == "65534\n"
    finally:
        shutil.rmtree(place)
