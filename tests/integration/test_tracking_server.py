"""A real MLflow server that dies under a run and comes back: no wait, no gap, no duplicate."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from toolkit.tracking import RecipeRun, StepRun, check, resolve, sync
from toolkit.tracking.client import connect
from toolkit.tracking.ui import free_port, serving
from toolkit.workspace import Workspace

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


class Server:
    """``mlflow server`` on a database of its own, as somebody else would run it."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        settings = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        argv = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        argv += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        argv += ["--artifacts-destination", str(self.folder / "files")]
        argv += ["--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                argv, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=2),
            ):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.3)
        raise TimeoutError(self.url)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def _points(client, run_id, key="loss"):
    return [(p.step, p.value) for p in client.get_metric_history(run_id, key)]


def test_a_server_killed_under_a_run_costs_no_time_and_no_point(server, tmp_path):
    store = resolve(server.url, Workspace(tmp_path / "runs"))
    check(store)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "report.md").write_text("# report")
    slowest = 0.0
    with RecipeRun.start(store, "outage", {"name": "outage"}, tmp_path / "r.yaml", {}) as parent:
        step = StepRun.start(store, "outage", parent.run_id, "train", config={"a": 1}, tags={})
        for i in range(1500):
            if i == 500:
                server.kill()
            begin = time.perf_counter()
            step.log(i, {"loss": 1 / (i + 1), "tokens": i})
            slowest = max(slowest, time.perf_counter() - begin)
            time.sleep(0.004)
        begin = time.monotonic()
        step.finish({"exact_match": 0.5}, tmp_path / "artifact")
        parent.step_done("train", {"exact_match": 0.5}, step.run_id, cached=False)
        assert step.run_id is not None
        assert "failed with exception" in step.lost
    assert time.monotonic() - begin < 25
    assert slowest < 0.25, "a disk write on a busy machine, never a wait for the server"
    assert len(list(store.outboxes.iterdir())) == 2
    assert {one.lost is None for one in sync(store.outboxes)} == {False}

    server.start()
    assert {one.lost for one in sync(store.outboxes)} == {None}
    assert list(store.outboxes.iterdir()) == []
    client = connect(store)
    assert _points(client, step.run_id) == [(i, 1 / (i + 1)) for i in range(1500)]
    assert _points(client, step.run_id, "tokens") == [(i, float(i)) for i in range(1500)]
    child, whole = client.get_run(step.run_id), client.get_run(parent.run_id)
    assert (child.info.status, whole.info.status) == ("FINISHED", "FINISHED")
    assert child.data.metrics["exact_match"] == 0.5
    assert whole.data.metrics["train.exact_match"] == 0.5
    uploaded = {f.path for f in client.list_artifacts(step.run_id, "artifact")}
    assert uploaded == {"artifact/report.md"}
    assert len(client.search_runs([child.info.experiment_id], "tags.`toolkit.step` = 'train'")) == 1


def test_a_server_that_comes_back_gets_everything_while_the_run_goes_on(server, tmp_path):
    store = resolve(server.url, Workspace(tmp_path / "runs"))
    server.kill()
    back = threading.Timer(1, server.start)
    with StepRun.start(store, "outage", None, "train", config={}, tags={}) as step:
        assert step.run_id is None
        back.start()
        count = 0
        while step.run_id is None or step.lost:
            step.log(count, {"loss": float(count)})
            count += 1
            time.sleep(0.05)
        back.join()
        step.finish({})
    assert list(store.outboxes.iterdir()) == []
    assert _points(connect(store), step.run_id) == [(i, float(i)) for i in range(count)]


def test_a_worker_killed_in_the_middle_is_completed_by_the_next_run(server, tmp_path):
    store = resolve(server.url, Workspace(tmp_path / "runs"))
    code = """
import sys, time
from pathlib import Path
from toolkit.tracking import StepRun, resolve
from toolkit.workspace import Workspace
store = resolve(sys.argv[1], Workspace(Path(sys.argv[2])))
run = StepRun.start(store, "outage", None, "victim", config={}, tags={})
for i in range(100000):
    run.log(i, {"loss": float(i)})
    if run.run_id and i % 100 == 0:
        print(run.run_id, i, flush=True)
    time.sleep(0.001)
"""
    argv = [sys.executable, "-c", code, server.url, str(tmp_path / "runs")]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        for _ in range(20):
            run_id, last = worker.stdout.readline().split()
        worker.kill()
    with RecipeRun.start(store, "outage", {"name": "next"}, tmp_path / "r.yaml", {}):
        pass
    # The next run waits ten seconds for the replay; what a slow store did not take then, `runs sync` brings.
    deadline = time.monotonic() + 120
    while list(store.outboxes.iterdir()) and time.monotonic() < deadline:
        sync(store.outboxes)
        time.sleep(0.5)
    assert list(store.outboxes.iterdir()) == []
    client = connect(store)
    assert client.get_run(run_id).info.status == "KILLED"
    points = _points(client, run_id)
    assert points == [(i, float(i)) for i in range(len(points))]
    assert len(points) > int(last)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)]
)
def test_the_ui_answers_and_leaves_no_process(tmp_path, number, status):
    workspace = Workspace(tmp_path / "runs")
    with RecipeRun.start(
        resolve(f"sqlite:///{workspace.root}/mlflow.db", workspace),
        "d",
        {"name": "d"},
        tmp_path / "r",
        {},
    ):
        pass
    port = free_port("127.0.0.1")
    argv = [
        sys.executable,
        "-m",
        "toolkit",
        "ui",
        "--port",
        str(port),
        "--workspace",
        str(workspace.root),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    with subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as ui:
        assert ui.stdout.readline() == f"MLflow: http://127.0.0.1:{port}\n"
        started = psutil.Process(ui.pid).children(recursive=True)
        check(f"http://127.0.0.1:{port}")
        ui.send_signal(number)
        assert ui.wait(60) == status
    assert started
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


def test_a_server_that_cannot_start_is_told_with_its_log(tmp_path):
    (tmp_path / "x.db").write_text("no database" * 100)
    store = resolve(f"sqlite:///{tmp_path}/x.db", Workspace(tmp_path / "runs"))
    from toolkit.errors import TrackingError

    with pytest.raises(TrackingError, match="the MLflow UI ended with") as caught:  # noqa: SIM117
        with serving(store, "127.0.0.1", free_port("127.0.0.1"), tmp_path / "ui.log"):
            pass
    assert str(tmp_path / "ui.log") in caught.value.hint
