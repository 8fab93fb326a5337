"""Jobs without an engine: states, causes, retries, profiles, limits, places, the words of refusals."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from tests.contract.world import World
from toolkit import errors
from toolkit.cli import job_tables
from toolkit.engines.guard import descendants
from toolkit.launch import actions, causes, limits, locks, logs, report, retries, secrets, snapshot
from toolkit.launch.folder import LOST_S, JobFolder, write
from toolkit.launch.local import Local
from toolkit.launch.local.places import Places
from toolkit.launch.local.section import LocalSection
from toolkit.launch.profiles import LimitsSection, Profile, seconds_of
from toolkit.launch.spec import JobSpec, Resources
from toolkit.launch.states import Cause, Seen, State, translate
from toolkit.launch.supervise import Supervisor


@pytest.fixture
def world(tmp_path):
    return World(tmp_path, "local", {"folder": str(tmp_path / "places")})


def attempt(job: JobFolder, cause=None, *, kept=False, beat_age=0.0, at=None, **end):
    """An attempt that runs, or ended with a cause."""
    made = job.next_attempt()
    begun = at or time.time() - 10
    write(
        made.folder / "started.json",
        {"at": begun, "host": "n1", "gpus": "3", "pid": 1, "start_time": 1},
    )
    made.beat()
    os.utime(made.folder / "beat", (time.time() - beat_age,) * 2)
    if cause:
        told = {"at": begun + 4, "exit_code": 1, "message": "it broke", "hint": None, "kept": kept}
        write(made.folder / "ended.json", told | {"cause": cause, "again": False} | end)
    return made


def states(world, chain, seen=None):
    return [one.state for one in report.of_chain(world.jobs, world.record(chain), seen)]


def test_a_job_with_a_fresh_heartbeat_runs_and_one_without_is_lost(world):
    chain = world.write(["true"])
    attempt(world.job(chain))
    assert states(world, chain) == [State.running]
    attempt(world.job(chain), beat_age=LOST_S + 5)
    (one,) = report.of_chain(world.jobs, world.record(chain))
    assert (one.state, one.cause) == (State.retrying, "lost")
    assert one.reason.startswith("no heartbeat for 95 s")


def test_heartbeats_find_what_the_engine_says_runs(world):
    chain = world.write(["true"], retries=0)
    world.job(chain).write("submitted.json", {"id": "7", "at": 1.0, "text": ""})
    attempt(world.job(chain), beat_age=LOST_S + 5)
    (one,) = report.of_chain(world.jobs, world.record(chain), {"7": Seen(State.running, "R")})
    assert (one.state, one.cause, one.word) == (State.failed, "lost", "R")
    assert one.reason.endswith("no try is left")


def test_what_the_engine_ended_before_it_began_has_the_engines_reason(world):
    chain = world.write(["true"])
    world.job(chain).write("submitted.json", {"id": "7", "at": 1.0, "text": ""})
    seen = {"7": Seen(State.failed, "BF", "launch failed requeued held", 1, "n7")}
    (one,) = report.of_chain(world.jobs, world.record(chain), seen)
    assert (one.state, one.reason, one.host) == (State.failed, "launch failed requeued held", "n7")


@pytest.mark.parametrize(
    ("cause", "state"),
    [
        ("done", State.succeeded),
        ("failed", State.failed),
        ("usage", State.failed),
        ("out_of_memory", State.failed),
        ("time_limit", State.failed),
        ("cancelled", State.cancelled),
        ("preempted", State.preempted),
        ("lost", State.retrying),
    ],
)
def test_every_cause_has_a_state(world, cause, state):
    chain = world.write(["true"])
    attempt(world.job(chain), cause)
    assert states(world, chain) == [state]


def test_a_failure_cancels_what_comes_after_with_its_reason(world):
    chain = world.write(["true"], ["true"], ["true"])
    attempt(world.job(chain), "failed", message="it broke:\n  " + "a line " * 20)
    reports = report.of_chain(world.jobs, world.record(chain))
    assert [one.state for one in reports] == [State.failed, State.cancelled, State.cancelled]
    short = f"it broke: {'a line ' * 15}a …"
    assert job_tables.row(reports[0])[-1] == short
    assert {one.reason for one in reports[1:]} == {f"step-1 failed: {short}"}
    assert report.state_of(reports) is State.failed


def test_progress_costs_no_try_and_standing_still_does():
    spec = JobSpec("a", "a", "a", "data", "/", (), (), retries=1)
    went_on = {"cause": "preempted", "kept": True}
    stood = {"cause": "lost", "kept": False}
    assert retries.again(spec, [went_on] * 20)
    assert retries.again(spec, [went_on, stood])
    assert not retries.again(spec, [stood, went_on, stood])
    assert not retries.again(spec, [{"cause": "failed", "kept": True}])
    assert [retries.pause_s([stood] * n) for n in (0, 1, 2, 30)] == [0, 2, 4, 300]


def test_what_ranks_say_when_they_end_is_no_progress(world):
    """Else a training of several ranks that never keeps a checkpoint would be tried again for ever."""
    job = world.job(world.write(["true"]))
    job.state.mkdir()
    for name in ("log.txt", "error.json", "rank-0.json", "again-0.json"):
        (job.state / name).touch()
    assert not job.kept_since(0)
    (job.state / "checkpoints" / "step-2").mkdir(parents=True)
    assert not job.kept_since(0)
    (job.state / "checkpoints" / "step-2" / "state.json").touch()
    assert job.kept_since(0)


def test_words_of_engines_are_in_a_table_or_an_error():
    with pytest.raises(errors.UnknownStateError) as caught:
        translate("Slurm", {"PD": State.queued}, "XX")
    assert caught.value.message == "Slurm says that a job is 'XX', which is in no table of ours"
    assert "known: PD" in caught.value.hint


GUESSED = f"step train: its process was ended by SIGKILL {causes.GUESS}"


@pytest.mark.parametrize(
    ("error", "by_kernel", "cause"),
    [
        (errors.StepFailedError(GUESSED), False, Cause.lost),
        (errors.StepFailedError(GUESSED), True, Cause.out_of_memory),
        (
            errors.StepFailedError("CUDA out of memory. Tried to allocate"),
            False,
            Cause.out_of_memory,
        ),
        (
            errors.StepFailedError("asked to stop (SIGTERM), after step 3 of 9"),
            False,
            Cause.preempted,
        ),
        (errors.DataError("no row has a trained token"), False, Cause.usage),
        (errors.DriftError("changed"), False, Cause.usage),
        (errors.NotInstalledError("no train"), False, Cause.not_installed),
        (errors.GateFailedError("worse"), False, Cause.failed),
    ],
)
def test_the_cause_is_in_the_errors_type_and_words(error, by_kernel, cause):
    assert causes.of_error(error, by_kernel) is cause


def test_a_lock_that_was_handed_down_is_ours_and_nobody_elses(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    given = os.open(path, os.O_RDWR | os.O_CREAT)
    assert locks.take(given)
    assert locks.hold(path) is None  # not ours: we were not told of it
    monkeypatch.setenv(locks.HELD, str(given))
    assert locks.hold(path) == given
    assert locks.is_held(path)
    os.close(given)
    assert not locks.is_held(path)


def test_who_checks_a_lock_keeps_it_from_nobody(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    check = os.open(path, os.O_RDWR)
    fcntl.flock(check, fcntl.LOCK_SH)  # as is_held does, in the moment before it lets go
    assert not locks.is_held(path)
    later = threading.Timer(0.05, os.close, [check])
    later.start()
    assert locks.hold(path) is not None
    later.join()
    assert locks.is_held(path)


def test_places_are_given_whole_or_not_at_all(tmp_path):
    places = Places(LocalSection(gpus=(4, 5), slots=1, folder=str(tmp_path)))
    first = places.take(Resources(gpus=1))
    assert first.gpus == (4,)
    assert places.take(Resources(gpus=2)) is None
    second = places.take(Resources(gpus=1))  # what was tried above was let go
    assert second.gpus == (5,)
    slot = places.take(Resources())
    assert places.take(Resources()) is None
    for taken in (first, second, slot):
        taken.close()
    assert places.take(Resources(gpus=2)).gpus == (4, 5)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30m", 1800), ("12h", 43200), ("2d", 172800)]
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1.5h", "0", "3w", "1h30m"])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match="is no time: write 90, 30m, 12h or 2d"):
        seconds_of(text)


def test_limits_refuse_politely(world):
    chain = world.write(["true"], resources=Resources(gpus=2))
    attempt(world.job(chain), at=time.time() - 3600)
    spec = JobSpec(
        "a", "a", "a", "train", "/", (), (), resources=Resources(gpus=4, time_limit_s=7200)
    )
    made = SimpleNamespace(folder=world.jobs / "new", jobs=(spec,))
    made.profile = Profile(name="test", limits=LimitsSection(concurrent=1))
    with pytest.raises(errors.LimitError) as caught:
        limits.check(made)
    assert caught.value.message == f"profile test allows 1 at once, and 1 are under way: {chain}"
    made.profile = Profile(name="test", limits=LimitsSection(gpu_hours=9.5))
    with pytest.raises(errors.LimitError) as caught:
        limits.check(made)
    assert caught.value.message == (
        "profile test allows 9.5 GPU-hours: 2.00 are used, and this asks for up to 8.00 more"
    )
    made.profile = Profile(name="test", limits=LimitsSection(gpu_hours=10.5, concurrent=2))
    limits.check(made)


def test_gpu_hours_count_every_try(world):
    chain = world.write(["true"], resources=Resources(gpus=2, nodes=3))
    for _ in range(2):
        attempt(world.job(chain), "preempted", at=1000.0)
    (one,) = report.of_chain(world.jobs, world.record(chain))
    assert one.gpu_hours == pytest.approx(2 * 3 * 8 / 3600)


def test_secrets_of_another_kind_are_refused(monkeypatch):
    monkeypatch.setenv("MINE", "x")
    assert secrets.values({"A": "env:MINE"}) == {"A": "x"}
    with pytest.raises(errors.BackendError, match="'vault:a' is neither env:NAME nor file:/path"):
        secrets.values({"A": "vault:a"})
    with pytest.raises(errors.BackendError, match="NOT_MINE is not set where jobs are started"):
        secrets.values({"A": "env:NOT_MINE"})


def test_half_a_line_waits_for_its_end(tmp_path):
    tail = logs.Tail(tmp_path / "log")
    assert tail.read() == []
    (tmp_path / "log").write_bytes(b"one\ntw")
    assert tail.read() == ["one"]
    with (tmp_path / "log").open("ab") as file:
        file.write(b"o\nthree")
    assert tail.read() == ["two"]
    assert tail.read(last=True) == ["three"]


def test_names_are_found_by_their_beginning_and_mistakes_are_named(world):
    first, second = world.write(["true"], name="ab"), world.write(["true"], name="ac")
    assert list(actions.find(world.jobs, ["ab"])) == [first]
    assert actions.find(world.jobs, [f"{second}-01-step"]) == {second: [f"{second}-01-step"]}
    with pytest.raises(errors.UsageError, match=f"a may be {first}, {second}"):
        actions.find(world.jobs, ["a"])
    with pytest.raises(errors.UsageError, match="no chain and no job is named 'x'"):
        actions.find(world.jobs, ["x"])


@pytest.mark.parametrize(
    ("backend", "reason"), [("local", "waits for its turn"), ("slurm", report.NOT_GIVEN)]
)
def test_a_job_that_no_engine_has_says_for_what_it_waits(tmp_path, backend, reason):
    world = World(tmp_path, backend)
    chain = world.write(["true"], ["true"])
    first, second = report.of_chain(world.jobs, world.record(chain))
    assert (first.state, first.reason) == (State.queued, reason)
    assert (second.state, second.reason) == (State.queued, "after step-1")


def test_retry_of_what_runs_or_succeeded_is_refused(world):
    chain = world.write(["true"])
    attempt(world.job(chain))
    with pytest.raises(errors.UsageError, match="is not over"):
        actions.retry(world.jobs, world.record(chain))
    attempt(world.job(chain), "done")
    with pytest.raises(errors.UsageError, match=r"all jobs of .* succeeded"):
        actions.retry(world.jobs, world.record(chain))


def test_the_mirror_copies_code_and_small_files_and_links_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "COPY_BYTES", 100)
    project = tmp_path / "project"
    (project / "deep").mkdir(parents=True)
    (project / "rows.py").write_text("import other\n" + "#" * 200)
    (project / "other.py").write_text("")
    (project / "deep" / "data.jsonl").write_text("{}")
    (project / "large.jsonl").write_text("x" * 101)
    root = tmp_path / "source"
    for name in ("rows.py", "deep/data.jsonl", "large.jsonl"):
        snapshot._bring(project / name, root)
    mirror = root / str(project).lstrip("/")
    assert (mirror / "rows.py").read_text().startswith("import other")
    assert (mirror / "other.py").is_file()
    assert not (mirror / "rows.py").is_symlink()
    assert (mirror / "large.jsonl").is_symlink()
    assert (mirror / "deep" / "data.jsonl").read_text() == "{}"
    (project / "other.py").write_text("raise RuntimeError")
    assert (mirror / "other.py").read_text() == ""


def test_the_shim_says_what_happened(world):
    """The real program, in this machine's process table, without a keeper."""
    import subprocess

    chain = world.write([sys.executable, "-c", "print('hello'); raise SystemExit(3)"])
    spec = world.job(chain).spec
    done = subprocess.run(
        spec.argv, env=os.environ | dict(spec.env), capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (3, b"hello\n")
    ended = world.job(chain).attempts[0].ended
    assert (ended["cause"], ended["message"]) == (
        "not_installed",
        "its process ended with 3: hello",
    )
    assert world.job(chain).attempts[0].log().read_text() == "hello\n"


def test_the_shim_asks_to_be_started_again_after_a_signal(world):
    import subprocess

    script = "import time; print('up', flush=True); time.sleep(60)"
    chain = world.write([sys.executable, "-c", script])
    spec = world.job(chain).spec
    process = subprocess.Popen(spec.argv, env=os.environ | dict(spec.env), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    again = subprocess.run(
        spec.argv, env=os.environ | dict(spec.env), capture_output=True, check=False
    )
    assert again.returncode == 4
    assert again.stderr == b"this job runs already: a second start does nothing\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75
    process.stdout.close()
    ended = world.job(chain).attempts[0].ended
    assert (ended["cause"], ended["message"]) == ("preempted", "told to stop by SIGUSR1")
    assert ended["again"] is True


def test_a_signal_for_every_process_of_a_job_ends_none_before_its_checkpoint(world, tmp_path):
    """As Slurm does it: SIGTERM to all of them, and srun gives SIGUSR1 to all of them."""
    import subprocess

    script = (
        "import time; from pathlib import Path; from toolkit.worker import raise_on_sigterm\n"
        "raise_on_sigterm(); print('up', flush=True)\n"
        "try: time.sleep(60)\n"
        f"finally: time.sleep(2); Path({str(tmp_path / 'kept')!r}).touch()"
    )
    chain = world.write([sys.executable, "-c", script])
    spec = world.job(chain).spec
    process = subprocess.Popen(spec.argv, env=os.environ | dict(spec.env), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    everybody = [process.pid, *descendants(process.pid)]
    assert len(everybody) == 2
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for pid in everybody:
            os.kill(pid, number)
    assert process.wait(60) == 75
    process.stdout.close()
    assert (tmp_path / "kept").exists()


def test_a_job_is_plain_data(tmp_path):
    spec = JobSpec(
        "a-1",
        "a",
        "s",
        "train",
        str(tmp_path),
        ("b",),
        ("x", "ü\n"),
        {"K": "$v"},
        options={"q": [1]},
    )
    (tmp_path / "job.json").write_text(spec.to_json())
    assert JobSpec.read(tmp_path) == spec
    assert json.loads(spec.to_json())["resources"]["gpus"] == 0


def test_the_template_of_this_machines_queue_is_a_profile():
    from toolkit import resources
    from toolkit.launch import profiles

    profile = profiles.load(resources.shipped("jobs/templates") / "local.yaml")
    assert profile.options == {"gpus": None, "slots": 2, "folder": None}


def test_a_cancelled_chain_ends_killed_in_mlflow_with_the_run_that_waited(world):
    """Its training was preempted and waits; the chain is cancelled; nobody runs that could end the runs."""
    from toolkit.launch.settle import reopen, settle
    from toolkit.tracking import RecipeRun, StepRun, resolve
    from toolkit.tracking.client import connect
    from toolkit.workspace import Workspace

    chain = world.write(["true"], ["true"])
    store = resolve(None, Workspace(world.folder / "runs"))
    parent = RecipeRun.start(
        store, "demo", {"name": "demo"}, world.folder / "r.yaml", {}, key=chain
    )
    parent.leave()
    job = world.job(chain)
    child = StepRun.start(
        store, "demo", parent.run_id, "step-1", config={}, tags={}, key=job.path.name
    )
    child.wait(60)
    child.leave("SCHEDULED")
    record = world.record(chain) | {"store": store.described(), "experiment": "demo"}
    record |= {"course": {"recipe": {"name": "demo"}}}
    write(world.jobs / chain / "chain.json", record)
    write(world.jobs / chain / "parent.json", {"parent_run": parent.run_id})
    attempt(job, "preempted", kept=True)
    assert settle(world.jobs / chain) is None
    job.write("cancelled.json", {"at": time.time(), "by": "me"})
    assert settle(world.jobs / chain) == "KILLED"
    client = connect(store)
    ended = [client.get_run(run.run_id).info.status for run in (parent, child)]
    assert ended == ["KILLED", "KILLED"]
    assert settle(world.jobs / chain) == "KILLED"  # and nothing more
    said = client.get_run(parent.run_id).data.tags["toolkit.error"]
    assert said == "step-1: cancelled by me"
    reopen(world.jobs / chain)  # as `jobs retry` does
    again = client.get_run(parent.run_id)
    assert again.info.status == "RUNNING"
    assert "toolkit.error" not in again.data.tags


def test_without_the_queues_package_a_submission_says_so(world, monkeypatch):
    from toolkit.launch import keeper_process

    monkeypatch.setattr(keeper_process, "find_spec", lambda _: None)
    with pytest.raises(errors.NotInstalledError) as caught:
        keeper_process.ask(world.jobs / world.write(["true"]))
    assert "the package dbos is not installed" in caught.value.message
    assert caught.value.hint.startswith("pip install 'dbos>=3.4,<4'")


def test_a_shim_that_wrote_its_last_word_and_still_ends_is_no_new_start(world):
    job = world.job(world.write([sys.executable, "-c", ""]))
    attempt(job, "preempted", kept=True, again=True)
    descriptor = os.open(job.lock, os.O_RDWR | os.O_CREAT)
    assert locks.take(descriptor)
    threading.Timer(0.5, os.close, [descriptor]).start()
    engine = Local(world.options, world.jobs)
    assert asyncio.run(Supervisor(engine, world.jobs).supervise(job)) == "over"
    while engine._started:  # as the keeper does
        engine.reap()
        time.sleep(0.01)
    assert [one.ended["cause"] for one in job.attempts] == ["preempted", "done"]


def test_chains_that_are_over_cost_no_engines_client(tmp_path):
    """The Kubernetes client alone takes a second to be imported."""
    world = World(tmp_path, "kubernetes", {"image": "x"})
    chain = world.write(["true"])
    attempt(world.job(chain), "done", at=time.time() - 5, exit_code=0)
    world.job(chain).write("submitted.json", {"id": "job/x", "at": time.time(), "text": ""})
    write(world.jobs / chain / "settled.json", {"status": "FINISHED"})
    code = (
        "import sys; from toolkit.cli import toolkit as command\n"
        "command(sys.argv[1:], standalone_mode=False)\n"
        "print({'kubernetes', 'pydantic', 'dbos', 'mlflow'} & set(sys.modules))"
    )
    where = ("--workspace", str(world.jobs.parent), "--json")
    done = subprocess.run(
        [sys.executable, "-c", code, "jobs", "list", *where],
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"state": "succeeded"' in done.stdout
    assert done.stdout.endswith("set()\n")
