"""Runs in a real SQLite store, read back with MLflow's own client."""

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolkit.cli import toolkit
from toolkit.errors import NotInstalledError, TrackingError, UsageError
from toolkit.tracking import Dataset, RecipeRun, StepRun, resolve, sync
from toolkit.tracking.client import connect
from toolkit.tracking.history import recipe_run, recipe_runs
from toolkit.tracking.outbox import Outbox
from toolkit.tracking.ui import command, require_port, require_server
from toolkit.tracking.uploads import small_files
from toolkit.workspace import Workspace

RECIPE = {"name": "tickets", "train": {"lora": {"rank": 8}}, "prompt": "x" * 9000}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("tracking") / "runs")


@pytest.fixture(scope="module")
def store(workspace):
    return resolve(f"sqlite:///{workspace.root}/mlflow.db", workspace)


@pytest.fixture(scope="module")
def client(store):
    return connect(store)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "loss.png").write_bytes(b"png")
    (folder / "manifest.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "big.json").write_bytes(b" " * 6 * 1024 * 1024)
    (folder / "report").mkdir()
    (folder / "report" / "card.md").write_text("# card")
    return folder


@pytest.fixture(scope="module")
def finished(store, artifact, tmp_path_factory):
    """One recipe run with a step that worked; their ids."""
    path = tmp_path_factory.mktemp("recipe") / "tickets.yaml"
    path.write_text("name: tickets\n")
    data = Dataset("tickets", "d" * 64, "/data", "training", {"rows": 3})
    with RecipeRun.start(store, "demo", RECIPE, path, {}) as parent:
        with StepRun.start(
            store,
            "demo",
            parent.run_id,
            "train",
            config={"lora": {"rank": 8}},
            tags={"toolkit.template": "abc"},
            datasets=[data],
            lock_text="torch==2.13.0\n",
        ) as step:
            for i in range(30):
                step.log(i, {"loss": 3 / (i + 1), "note": "no number"})
            step.model("tickets", "merged", artifact, "f" * 64)
            step.finish({"exact_match": 0.5}, artifact, "f" * 64)
        parent.step_done("train", {"exact_match": 0.5}, step.run_id, cached=False)
    return parent.run_id, step.run_id


def _artifacts(client, run_id, folder=None):
    return {file.path for file in client.list_artifacts(run_id, folder)}


def test_parent_and_child_end_finished_with_nothing_left_to_send(client, store, finished):
    parent, child = map(client.get_run, finished)
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert list(store.outboxes.iterdir()) == []


def test_metrics_arrive_by_step(client, finished):
    points = client.get_metric_history(finished[1], "loss")
    assert [(p.step, p.value) for p in points] == [(i, 3 / (i + 1)) for i in range(30)]
    assert "note" not in client.get_run(finished[1]).data.metrics


def test_settings_are_parameters_and_the_whole_is_an_artifact(client, finished, tmp_path):
    params = client.get_run(finished[0]).data.params
    assert params["train.lora.rank"] == "8"
    assert len(params["prompt"]) == 6000
    whole = Path(client.download_artifacts(finished[0], "config.json", str(tmp_path)))
    assert json.loads(whole.read_text()) == RECIPE
    assert "tickets.yaml" in _artifacts(client, finished[0])


def test_system_metrics_and_peak_memory_are_there(client, finished):
    metrics = client.get_run(finished[1]).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert "system/cpu_utilization_percentage" in metrics
    assert "system/step_peak_memory_megabytes" in metrics


def test_datasets_have_digest_and_context(client, finished):
    (used,) = client.get_run(finished[1]).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("tickets", "d" * 36)
    assert json.loads(used.dataset.profile) == {"rows": 3}
    assert used.tags[0].value == "training"


def test_small_files_are_copied_and_weights_are_linked(client, finished, artifact):
    tags = client.get_run(finished[1]).data.tags
    assert tags["toolkit.artifact"] == str(artifact)
    assert tags["toolkit.fingerprint"] == "f" * 64
    assert tags["toolkit.template"] == "abc"
    assert _artifacts(client, finished[1], "artifact") == {
        "artifact/loss.png",
        "artifact/manifest.json",
        "artifact/report",
    }
    assert {p.name for p in small_files(artifact)} == {"loss.png", "manifest.json", "card.md"}
    assert "environment.lock.txt" in _artifacts(client, finished[1])


def test_the_model_is_known_with_its_metrics(client, finished):
    (made,) = client.get_run(finished[1]).outputs.model_outputs
    model = client.get_logged_model(made.model_id)
    assert (model.name, model.model_type, str(model.status)) == ("tickets", "merged", "READY")
    assert [(m.key, m.value) for m in model.metrics] == [("exact_match", 0.5)]


def test_the_parent_shows_the_metrics_of_its_steps(client, finished):
    parent = client.get_run(finished[0])
    assert parent.data.metrics["train.exact_match"] == 0.5
    assert parent.data.tags["toolkit.step.train"] == finished[1]


def test_a_failed_step_ends_failed_with_its_traceback(client, store, tmp_path):
    with pytest.raises(ValueError, match="too big"):  # noqa: SIM117
        with StepRun.start(store, "demo", None, "train", config={}, tags={}) as step:
            raise ValueError("rank 900 is too big")
    run = client.get_run(step.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["toolkit.error"] == "ValueError: rank 900 is too big"
    text = Path(client.download_artifacts(step.run_id, "traceback.txt", str(tmp_path))).read_text()
    assert "test_tracking_run.py" in text
    assert "ValueError: rank 900" in text


def test_the_traceback_of_another_process_is_kept_as_it_is(client, store, tmp_path):
    step = StepRun.start(store, "demo", None, "train", config={}, tags={})
    step.stage_traceback = "Traceback of the stage"
    step.fail(RuntimeError())
    file = client.download_artifacts(step.run_id, "traceback.txt", str(tmp_path))
    assert Path(file).read_text() == "Traceback of the stage"


def test_a_stopped_step_ends_killed(client, store):
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with StepRun.start(store, "demo", None, "train", config={}, tags={}) as step:
            raise KeyboardInterrupt
    assert client.get_run(step.run_id).info.status == "KILLED"


def _left_by_a_dead_process(store, end=None):
    """An outbox such as a killed worker leaves."""
    box = Outbox.create(store.outboxes, "train")
    box.put(
        "create",
        store=store.described(),
        experiment="demo",
        name="train",
        start_ms=1000,
        tags={"toolkit.key": box.folder.name},
    )
    for i in range(5):
        box.put("metrics", step=i, ms=1000 + i, metrics={"loss": float(i)})
    if end:
        box.put("finish", status=end, ms=2000)
    box.release()
    return box


def test_a_run_whose_process_was_killed_is_completed_and_ends_killed(client, store):
    _left_by_a_dead_process(store)
    (done,) = sync(store.outboxes)
    assert (done.name, done.lost, done.refused) == ("train", None, ())
    assert client.get_run(done.run_id).info.status == "KILLED"
    assert len(client.get_metric_history(done.run_id, "loss")) == 5
    assert sync(store.outboxes) == []


def test_a_delivery_whose_answer_was_lost_is_not_repeated(client, store, monkeypatch):
    """The store got the records, we died before we knew: all exist once after the replay."""
    from mlflow.tracking import MlflowClient

    box = _left_by_a_dead_process(store, "FINISHED")
    sent = []
    for method in ("create_run", "log_batch"):
        real = getattr(MlflowClient, method)

        def lose_the_answer(self, *args, real=real, method=method, **kwargs):
            answer = real(self, *args, **kwargs)
            if sent.count(method) == 0:
                sent.append(method)
                raise OSError("answer lost")
            return answer

        monkeypatch.setattr(MlflowClient, method, lose_the_answer)
    assert sync(store.outboxes)[0].lost == "answer lost"
    assert box.delivered.in_doubt
    assert box.delivered.run_id is None
    assert sync(store.outboxes)[0].lost == "answer lost"
    (done,) = sync(store.outboxes)
    assert done.lost is None
    experiment = client.get_experiment_by_name("demo").experiment_id
    key = box.folder.name
    assert len(client.search_runs([experiment], f"tags.`toolkit.key` = '{key}'")) == 1
    assert [p.step for p in client.get_metric_history(done.run_id, "loss")] == [0, 1, 2, 3, 4]


def test_what_mlflow_never_takes_is_passed_over_and_told(client, store):
    box = Outbox.create(store.outboxes, "train")
    box.put(
        "create",
        store=store.described(),
        experiment="demo",
        name="x",
        start_ms=1,
        tags={"toolkit.key": box.folder.name},
    )
    box.put("params", params={"a": "1"})
    box.put("params", params={"a": "2"})
    box.put("metrics", step=0, ms=1, metrics={"loss": 1.0})
    box.put("finish", status="FINISHED", ms=2)
    box.release()
    (done,) = sync(store.outboxes)
    assert len(done.refused) == 1
    assert "params: " in done.refused[0]
    assert client.get_run(done.run_id).data.metrics == {"loss": 1.0}


def test_a_deleted_experiment_is_told_with_the_way_back(client, store, tmp_path):
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="the experiment 'gone' was deleted there") as caught:
        RecipeRun.start(store, "gone", RECIPE, tmp_path / "r.yaml", {})
    assert "mlflow experiments restore" in str(caught.value)


def test_recipe_runs_are_listed_and_shown(store, finished):
    listed = recipe_runs(store, "tickets")
    assert finished[0] in [run.run_id for run in listed]
    assert recipe_runs(store, "nothing-like-it") == []
    shown = recipe_run(store, finished[0][:10])
    assert [(s.name, s.status, s.cached) for s in shown.steps] == [("train", "FINISHED", False)]
    assert shown.steps[0].metrics["exact_match"] == 0.5
    with pytest.raises(UsageError, match="no recipe run has an id that begins with 'zzz'"):
        recipe_run(store, "zzz")


def test_a_cached_step_leads_to_the_run_that_did_the_work(store, finished, tmp_path):
    with RecipeRun.start(store, "demo", {"name": "again"}, tmp_path / "r.yaml", {}) as parent:
        parent.step_done("train", {"exact_match": 0.5}, finished[1], cached=True)
    shown = recipe_run(store, parent.run_id)
    assert [(s.run_id, s.cached) for s in shown.steps] == [(finished[1], True)]
    assert shown.run.metrics == {"train.exact_match": 0.5}


@pytest.fixture
def cli(workspace, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*args, root=workspace.root):
        return CliRunner().invoke(toolkit, ["runs", *args, "--workspace", str(root)])

    return call


def test_runs_list_and_show_print_tables_and_json(cli, finished):
    listed = cli("list", "tickets")
    assert listed.exit_code == 0
    assert finished[0][:8] in listed.output
    assert finished[0] in [run["run_id"] for run in json.loads(cli("list", "--json").output)]
    shown = cli("show", finished[0])
    assert "exact_match=0.5" in shown.output
    assert json.loads(cli("show", finished[0], "--json").output)["steps"][0]["name"] == "train"


def test_listing_a_new_workspace_makes_nothing(cli, tmp_path):
    assert "no recipe runs in" in cli("list", root=tmp_path / "new").output
    assert not (tmp_path / "new").exists()
    assert "nothing was missed" in cli("sync", root=tmp_path / "new").output


def test_the_ui_needs_the_whole_mlflow(monkeypatch):
    monkeypatch.setattr("toolkit.tracking.ui.find_spec", lambda name: None)
    with pytest.raises(NotInstalledError, match="the MLflow UI is not installed") as caught:
        require_server()
    assert caught.value.hint == "pip install 'toolkit[ui]'"


def test_a_taken_port_is_told_with_one_that_is_free():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is not free") as caught:
            require_port("127.0.0.1", port)
    assert caught.value.hint.startswith("toolkit ui --port ")
    assert str(port) not in caught.value.hint


def test_the_ui_serves_the_right_store(store):
    argv = command(store, "127.0.0.1", 5001)
    assert argv[4:7] == ["-m", "mlflow", "server"]
    assert argv[argv.index("--backend-store-uri") + 1] == store.uri
    assert argv[argv.index("--workers") + 1] == "1"


def test_ui_on_a_server_only_says_where_it_is(monkeypatch):
    monkeypatch.setattr("toolkit.tracking.store._ask_server", lambda uri: None)
    done = CliRunner().invoke(toolkit, ["ui", "--tracking", "http://127.0.0.1:9"])
    assert done.output == "MLflow: http://127.0.0.1:9\n"


def test_nothing_of_mlflow_reaches_the_terminal(store, tmp_path, capfd):
    with RecipeRun.start(store, "demo", RECIPE, tmp_path / "r.yaml", {}):
        pass
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("mlflow").level >= logging.ERROR


def test_a_run_with_a_key_is_gone_on_with_by_another_process(client, store):
    """Left by one process, taken up by the next: one run, SCHEDULED in between."""
    first = StepRun.start(
        store, "demo", None, "train", config={"a": 1}, tags={}, key="tickets-1-train"
    )
    first.left = lambda _: True
    first.log(1, {"loss": 3.0})
    first.wait(60)
    first.fail(NotInstalledError("gone for now"))
    run_id = first.run_id
    assert client.get_run(run_id).info.status == "SCHEDULED"
    second = StepRun.start(
        store, "demo", None, "train", config={"a": 1}, tags={}, key="tickets-1-train"
    )
    second.wait(60)
    assert second.run_id == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    second.log(2, {"loss": 2.0})
    second.finish({})
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 2]
    assert "toolkit.error" not in client.get_run(run_id).data.tags


def test_what_a_killed_process_could_not_deliver_is_in_the_same_run(client, store):
    box = Outbox.keyed(store.outboxes, "tickets-2-train")
    tags = {"toolkit.key": "tickets-2-train"}
    described = store.described()
    box.put("create", store=described, experiment="demo", name="train", start_ms=1, tags=tags)
    box.put("metrics", step=1, ms=1, metrics={"loss": 3.0}, of_model=False)
    box.release()  # as the kernel does when its process dies
    run = StepRun.start(store, "demo", None, "train", config={}, tags={}, key="tickets-2-train")
    run.wait(60)
    run.log(2, {"loss": 2.0})
    run.finish({})
    assert [m.step for m in client.get_metric_history(run.run_id, "loss")] == [1, 2]


def test_a_run_that_was_left_is_not_killed_by_a_replay(client, store):
    run = StepRun.start(store, "demo", None, "train", config={}, tags={}, key="tickets-3-train")
    run.wait(60)
    run.leave("SCHEDULED")
    sync(store.outboxes)
    assert client.get_run(run.run_id).info.status == "SCHEDULED"
