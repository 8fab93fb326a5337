"""The engine against a small cluster over HTTP, whose containers are real processes (tests/fake_kubernetes.py)."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.fake_kubernetes import Cluster
from toolkit.errors import BackendError, NoPlaceError, NotInstalledError
from toolkit.launch.folder import JobFolder
from toolkit.launch.kubernetes.backend import Kubernetes
from toolkit.launch.spec import JobSpec, Resources
from toolkit.launch.states import Cause, State

WAITS = "import time; print('here', flush=True); time.sleep(60)"
OBEYS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print('here', flush=True); time.sleep(60)
"""
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)
print(child.pid, flush=True); time.sleep(60)
"""


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path / "cluster") as found:
        yield found


@pytest.fixture
def engine(cluster, tmp_path):
    return make(cluster, tmp_path)


def make(cluster, tmp_path, **changes):
    section = {
        "kubeconfig": str(cluster.kubeconfig()),
        "image": "toolkit",
        "volumes": [{"path": str(tmp_path), "claim": "team"}],
        **changes,
    }
    return Kubernetes(section, tmp_path / "jobs")


@pytest.fixture
def job(tmp_path):
    def made(code, number=1, **changes):
        given = JobSpec(
            id=f"t-00000000-{number:02d}-train", chain="t-00000000", step="train", stage="train",
            folder=str(tmp_path / "jobs" / str(number)), after=(), argv=(sys.executable, "-c", code), grace_s=1,
        )  # fmt: skip
        return replace(given, **changes)

    return made


def until(engine, engine_id, *states, word=None):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = engine.seen([engine_id]).get(engine_id)
        if found and found.state in states and word in (None, found.word):
            return found
        time.sleep(0.05)
    raise AssertionError(f"still {found}")


def lines(engine, engine_id, spec):
    return list(engine.logs(spec, engine_id))


def begins(spec):
    """What the shim does first."""
    return JobFolder(Path(spec.folder)).next_attempt()


def printed(cluster, pod) -> str:
    return (cluster.folder / f"{pod['metadata']['uid']}.log").read_text()


def started(cluster, name):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pods = cluster.pods(name)
        if pods and pods[0]["status"]["phase"] == "Running" and printed(cluster, pods[0]):
            return pods[0]["metadata"]["name"]
        time.sleep(0.05)
    raise AssertionError(cluster.pods())


def gone(pid) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_job_runs_to_its_end(engine, job):
    engine_id = engine.submit(job("print('hello')"), {})
    assert engine_id == "job/t-00000000-01-train"
    found = until(engine, engine_id, State.succeeded)
    assert (found.exit_code, found.host) == (0, "node-1")


def test_what_is_rendered_is_what_is_sent(cluster, engine, job):
    spec = job("pass")
    engine.submit(spec, {})
    sent = cluster.objects["jobs"][spec.id]
    rendered = yaml.safe_load(engine.render(spec, {}))
    assert {**sent["spec"], "suspend": False} == {**rendered["spec"], "suspend": False}
    assert sent["metadata"]["labels"] == rendered["metadata"]["labels"]


def test_arguments_and_variables_arrive_unchanged(cluster, tmp_path, job):
    engine = make(cluster, tmp_path)
    words = ("a b", "$(HOME)", "$$", "'\"", "line\nline", "ü€😀", "", "-n", "1e3")
    env = {"A": "$(B) $$(B)\n'\"", "B": "1e3"}
    code = (
        "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['A'], os.environ['B']]))"
    )
    spec = job(code, env=env)
    spec = replace(spec, argv=(*spec.argv, *words))
    engine_id = engine.submit(spec, {})
    until(engine, engine_id, State.succeeded)
    assert json.loads(lines(engine, engine_id, spec)[0]) == [list(words), env["A"], env["B"]]


def test_secrets_come_from_the_cluster(cluster, tmp_path, job):
    engine = make(cluster, tmp_path)
    spec = job("import os; print(os.environ['HF_TOKEN'])", secrets={"HF_TOKEN": "hf/token"})
    engine_id = engine.submit(spec, {})
    found = until(engine, engine_id, State.starting, word="CreateContainerConfigError")
    assert found.reason == 'secret "hf" not found'
    cluster.secrets["hf"] = {"token": "s3cr3t"}
    until(engine, engine_id, State.succeeded)
    assert lines(engine, engine_id, spec) == ["s3cr3t"]
    assert "s3cr3t" not in engine.render(spec, {})


def test_a_job_that_began_has_its_log_in_its_folder(engine, job):
    spec = job("pass")
    begins(spec).log().write_text("hello")
    assert engine.logs(spec, "job/t") is None


def test_what_a_pod_said_before_the_job_began_is_in_the_cluster(engine, job):
    spec = job("print('one\\ntwo'); raise SystemExit('no module named toolkit')")
    engine_id = engine.submit(spec, {})
    until(engine, engine_id, State.failed)
    assert sorted(lines(engine, engine_id, spec)) == ["no module named toolkit", "one", "two"]


def test_nothing_is_read_from_the_cluster_while_a_job_waits(cluster, engine, job):
    cluster.gpus = 0
    spec = job("pass", resources=Resources(gpus=1))
    assert engine.logs(spec, engine.submit(spec, {})) is None


def test_the_cause_of_a_failure_is_the_last_that_the_program_said(engine, job):
    engine_id = engine.submit(job("raise SystemExit('no such column')"), {})
    found = until(engine, engine_id, State.failed)
    assert (found.exit_code, found.reason, found.cause) == (1, "no such column", Cause.failed)


def test_a_second_submission_finds_the_first(cluster, engine, job):
    spec = job(WAITS)
    first = engine.submit(spec, {})
    assert engine.submit(spec, {}) == first
    until(engine, first, State.running)
    assert engine.submit(spec, {}) == first
    assert len(cluster.objects["jobs"]) == 1


def test_a_submitter_killed_before_it_wrote_the_id_down_leaves_one_job(cluster, engine, job):
    spec = job("pass")

    def dies(_method, _path):
        cluster.before_answer = lambda *_: None
        raise ConnectionAbortedError

    cluster.before_answer = dies
    with pytest.raises(BackendError, match="does not answer"):
        engine.submit(spec, {})
    engine_id = engine.submit(spec, {})
    until(engine, engine_id, State.succeeded)
    assert engine.submit(spec, {}) == engine_id
    assert len(cluster.objects["jobs"]) == 1


def test_a_start_over_is_a_new_object_beside_the_old_one(engine, job):
    spec = job("raise SystemExit(75)")
    first = engine.submit(spec, {})
    assert until(engine, first, State.preempted).cause is Cause.preempted
    assert engine.submit(spec, {}) == first
    begins(spec)
    assert "name: t-00000000-01-train-r2\n" in engine.render(spec, {})
    second = engine.submit(spec, {})
    assert second == f"{first}-r2"
    until(engine, second, State.preempted)
    assert set(engine.seen([first, second])) == {first, second}


def test_somebody_elses_object_of_that_name_is_not_taken_for_ours(cluster, engine, job):
    spec = job("pass")
    body = yaml.safe_load(engine.render(spec, {}))
    body["metadata"]["labels"] = {"app": "mine"}
    cluster.create("jobs", "ml", body)
    with pytest.raises(BackendError, match="is there already and is not the toolkit's") as no:
        engine.submit(spec, {})
    assert "kubectl describe job/t-00000000-01-train" in no.value.hint


def test_jobs_wait_for_gpus_with_the_schedulers_reason(cluster, engine, job):
    wants = Resources(gpus=3)
    first = engine.submit(job(WAITS, 1, resources=wants), {})
    until(engine, first, State.running)
    second = engine.submit(job("pass", 2, resources=wants), {})
    found = until(engine, second, State.queued, word="Unschedulable")
    assert "Insufficient nvidia.com/gpu" in found.reason
    engine.cancel([first])
    until(engine, second, State.succeeded)


def test_an_image_that_is_not_there_is_shown(cluster, engine, job):
    cluster.images = set()
    engine_id = engine.submit(job("pass"), {})
    found = until(engine, engine_id, State.starting, word="ImagePullBackOff")
    assert 'Back-off pulling image "toolkit"' in found.reason


def test_a_command_that_is_not_in_the_image_is_not_installed(engine, job):
    engine_id = engine.submit(replace(job(""), argv=("/opt/no/python",)), {})
    found = until(engine, engine_id, State.failed)
    assert (found.word, found.cause, found.exit_code) == ("StartError", Cause.not_installed, 128)


def test_preemption_lets_the_program_keep_a_checkpoint(cluster, engine, job):
    spec = job(OBEYS, grace_s=30)
    engine_id = engine.submit(spec, {})
    cluster.disrupt(started(cluster, spec.id))
    found = until(engine, engine_id, State.preempted)
    assert (found.exit_code, found.cause) == (75, Cause.preempted)


def test_preemption_of_a_program_that_says_nothing_is_preemption_all_the_same(cluster, engine, job):
    spec = job(WAITS)
    engine_id = engine.submit(spec, {})
    cluster.disrupt(started(cluster, spec.id))
    found = until(engine, engine_id, State.preempted)
    assert found.cause is Cause.preempted


def test_eviction_for_want_of_memory_on_the_node_is_tried_again(cluster, engine, job):
    spec = job(WAITS)
    engine_id = engine.submit(spec, {})
    cluster.evict(started(cluster, spec.id))
    found = until(engine, engine_id, State.preempted)
    assert (found.word, found.reason) == ("Evicted", "The node was low on resource: memory.")


def test_a_lost_node_is_seen_when_the_control_plane_has_seen_it(cluster, engine, job):
    spec = job(WAITS)
    engine_id = engine.submit(spec, {})
    started(cluster, spec.id)
    cluster.lose_node(forget=False)
    assert engine.seen([engine_id])[engine_id].state is State.running
    cluster.objects["pods"].clear()
    cluster.objects["jobs"].clear()
    assert engine.seen([engine_id]) == {}


def test_pods_deleted_with_their_node_are_lost(cluster, engine, job):
    spec = job(WAITS)
    engine_id = engine.submit(spec, {})
    started(cluster, spec.id)
    cluster.lose_node(forget=True)
    assert until(engine, engine_id, State.preempted).cause.retried


def test_out_of_memory_is_the_jobs_own_fault(cluster, engine, job):
    spec = job(WAITS)
    engine_id = engine.submit(spec, {})
    cluster.run_out_of_memory(started(cluster, spec.id))
    found = until(engine, engine_id, State.failed)
    assert (found.word, found.exit_code, found.cause) == ("OOMKilled", 137, Cause.out_of_memory)


def test_kueue_admits_and_takes_back(cluster, tmp_path, job):
    engine = make(cluster, tmp_path, queue="gpus")
    cluster.admitted = False
    spec = job(OBEYS, grace_s=30)
    engine_id = engine.submit(spec, {})
    assert until(engine, engine_id, State.queued).word in ("Pending", "Suspended")
    cluster.admitted = True
    started(cluster, spec.id)
    cluster.admitted = False
    # Kueue takes quota back by suspending the Job; its pod ends with 75, and by that the Job fails.
    assert until(engine, engine_id, State.preempted).exit_code == 75
    begins(spec)
    again = engine.submit(spec, {})
    until(engine, again, State.queued, word="Suspended")
    cluster.admitted = True
    until(engine, again, State.running)


def test_cancel_ends_the_whole_process_tree_and_can_be_repeated(cluster, engine, job, monkeypatch):
    monkeypatch.setattr("toolkit.launch.kubernetes.backend.CANCEL_S", 1)
    spec = job(STUBBORN, grace_s=600)
    engine_id = engine.submit(spec, {})
    started(cluster, spec.id)
    child = int(printed(cluster, cluster.pods()[0]))
    engine.cancel([engine_id])
    engine.cancel([engine_id])
    assert gone(child)
    until_gone(engine, engine_id)
    engine.cancel([engine_id])
    assert cluster.objects == {"jobs": {}, "jobsets": {}, "pods": {}}


def until_gone(engine, engine_id):
    deadline = time.monotonic() + 30
    while engine.seen([engine_id]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cancel_leaves_what_has_ended(cluster, engine, job):
    engine_id = engine.submit(job("pass"), {})
    until(engine, engine_id, State.succeeded)
    engine.cancel([engine_id])
    assert engine.seen([engine_id])[engine_id].state is State.succeeded


def test_a_job_that_is_being_deleted_is_no_place_for_a_new_start(cluster, engine, job):
    spec = job(OBEYS.replace("sys.exit(75)", "(time.sleep(1), sys.exit(75))"), grace_s=30)
    engine_id = engine.submit(spec, {})
    started(cluster, spec.id)
    engine.cancel([engine_id])
    with pytest.raises(NoPlaceError, match="t-00000000-01-train is being deleted"):
        engine.submit(spec, {})
    until_gone(engine, engine_id)
    again = engine.submit(replace(spec, argv=(sys.executable, "-c", "pass")), {})
    assert until(engine, again, State.succeeded).exit_code == 0


def test_several_nodes_know_who_they_are(cluster, tmp_path, job):
    engine = make(cluster, tmp_path)
    code = (
        "import os; print(*(os.environ['TOOLKIT_' + n] for n in ('NODE', 'START', 'RENDEZVOUS')))"
    )
    spec = job(code, resources=Resources(nodes=3))
    engine_id = engine.submit(spec, {})
    assert engine_id == f"jobset/{spec.id}"
    until(engine, engine_id, State.succeeded)
    nodes, starts, meeting = zip(
        *(line.split() for line in lines(engine, engine_id, spec)), strict=True
    )
    assert sorted(nodes) == ["0", "1", "2"]
    assert (len(set(starts)), set(meeting)) == (1, {f"{spec.id}-n-0-0.{spec.id}:29500"})


def test_one_node_that_fails_ends_the_others(cluster, engine, job):
    code = (
        f"import os\nif os.environ['TOOLKIT_NODE'] == '1': raise SystemExit('bad shard')\n{OBEYS}"
    )
    spec = job(code, resources=Resources(nodes=2), grace_s=30)
    engine_id = engine.submit(spec, {})
    found = until(engine, engine_id, State.failed)
    assert (found.exit_code, found.reason) == (1, "bad shard")
    deadline = time.monotonic() + 20
    while cluster.processes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not cluster.processes


def test_a_cluster_without_jobset_says_what_it_needs(cluster, engine, job):
    cluster.jobset_installed = False
    with pytest.raises(BackendError, match=r"refuses \(404\)") as no:
        engine.submit(job("pass", resources=Resources(nodes=2)), {})
    assert "jobset.sigs.k8s.io" in no.value.hint


def test_hundreds_of_jobs_are_seen_with_one_request_for_jobs_and_pages_of_pods(
    cluster, engine, job
):
    cluster.gpus, cluster.validates = 0, False
    ids = [engine.submit(job("pass", n, resources=Resources(gpus=1)), {}) for n in range(1, 61)]
    deadline = time.monotonic() + 30
    while len(cluster.pods()) < 60 and time.monotonic() < deadline:
        time.sleep(0.05)
    cluster.requests.clear()
    found = engine.seen(ids)
    assert {one.state for one in found.values()} == {State.queued}
    assert len(found) == 60
    assert [path.rpartition("/")[2] for _, path in cluster.requests] == ["pods", "jobs"]


def test_pages_are_put_together(cluster, engine, job, monkeypatch):
    monkeypatch.setattr("toolkit.launch.kubernetes.client.PAGE", 2)
    cluster.gpus, cluster.validates = 0, False
    ids = [engine.submit(job("pass", n, resources=Resources(gpus=1)), {}) for n in range(1, 6)]
    assert set(engine.seen(ids)) == set(ids)


def test_an_id_of_another_engine_is_left_out(engine):
    assert engine.seen(["12345", "job/t"]) == {}


def test_nothing_is_asked_about_no_jobs(cluster, engine):
    assert engine.seen([]) == {}
    engine.cancel([])
    assert cluster.requests == []


def test_a_server_that_is_away_is_said_with_its_address(cluster, engine, job):
    cluster.server.shutdown()
    cluster.server.server_close()
    with pytest.raises(BackendError, match=f"Kubernetes at {cluster.url} does not answer") as no:
        engine.seen(["job/t"])
    assert "kubectl cluster-info" in no.value.hint


def test_a_server_in_trouble_is_said_in_its_words(cluster, engine):
    cluster.broken = 503
    with pytest.raises(BackendError, match=r"refuses \(503\): the server is currently unable"):
        engine.seen(["job/t"])


def test_wrong_credentials_are_said(cluster, tmp_path):
    cluster.token = "right"
    engine = make(cluster, tmp_path)
    assert engine.seen(["job/t"]) == {}
    cluster.token = "another"
    with pytest.raises(BackendError, match=r"refuses \(401\)") as no:
        engine.seen(["job/t"])
    assert no.value.hint == "log in again, as for kubectl"


def test_a_context_that_is_not_there_is_said(cluster, tmp_path):
    engine = make(cluster, tmp_path, context="elsewhere")
    with pytest.raises(BackendError, match="no way to a Kubernetes cluster") as no:
        engine.seen(["job/t"])
    assert "kubernetes.context" in no.value.hint


def test_the_namespace_is_the_contexts_or_the_profiles(cluster, tmp_path):
    assert make(cluster, tmp_path).cluster.namespace == "ml"
    assert make(cluster, tmp_path, namespace="other").cluster.namespace == "other"


def test_without_the_client_the_extra_is_named(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(NotInstalledError, match="Kubernetes client is not installed") as no:
        engine.seen(["job/t"])
    assert no.value.hint == "pip install 'toolkit[kubernetes]'"
