"""A run that another process goes on with: every point once, in a real SQLite store."""

import math

import pytest

from toolkit.tracking import StepRun, resolve, sync
from toolkit.tracking.client import connect
from toolkit.tracking.outbox import Outbox
from toolkit.workspace import Workspace


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("again") / "runs")
    return resolve(f"sqlite:///{workspace.root}/mlflow.db", workspace)


@pytest.fixture(scope="module")
def client(store):
    return connect(store)


def attempt(store, key, points, end="leave"):
    """One try of a job: what it logs as (step, loss), then another goes on, or it dies without a word."""
    run = StepRun.start(store, "demo", None, "train", config={}, tags={}, key=key)
    assert run.wait(120)  # MLflow may be imported slowly, on a busy machine
    for step, loss in points:
        run.log(step, {"loss": loss})
    if end == "leave":
        run.leave("SCHEDULED")
    elif end == "finish":
        run.finish({"final_loss": 0.5})
        sync(store.outboxes)  # what it could not deliver in time
    else:  # SIGKILL: some of it was delivered, and nothing more is said
        run._sampler.stop()
        run._forwarder.close(20)
        run._outbox.release()
    return run.run_id


def curve(client, run_id, key="loss"):
    """As the page draws it: by step, then by time."""
    history = client.get_metric_history(run_id, key)
    points = sorted(history, key=lambda point: (point.step, point.timestamp))
    return [(point.step, point.value) for point in points]


@pytest.mark.parametrize("end", ["leave", "killed"])
def test_steps_that_are_done_again_stand_once_in_the_curve(client, store, end):
    """From a checkpoint after step 2: its log is told again, and steps 3 and 4 are done again."""
    key = f"job-{end}"
    run_id = attempt(store, key, [(n, 1 / n) for n in range(1, 5)], end)
    assert attempt(store, key, [(n, 1 / n) for n in range(1, 6)], end) == run_id
    assert attempt(store, key, [(n, 1 / n) for n in range(1, 8)], "finish") == run_id
    assert curve(client, run_id) == [(n, 1 / n) for n in range(1, 8)]
    assert curve(client, run_id, "final_loss") == [(0, 0.5)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_step_that_went_otherwise_the_second_time_stands_with_both_values(client, store):
    run_id = attempt(store, "other", [(1, 2.0), (2, 1.5)])
    attempt(store, "other", [(1, 2.0), (2, 1.25), (3, 1.0)], "finish")
    assert curve(client, run_id) == [(1, 2.0), (2, 1.5), (2, 1.25), (3, 1.0)]


def test_what_is_no_number_is_equal_to_itself(client, store):
    odd = [(1, math.nan), (2, math.inf), (3, -math.inf)]
    run_id = attempt(store, "odd", odd)
    attempt(store, "odd", odd, "finish")
    assert [step for step, _ in curve(client, run_id)] == [1, 2, 3]


def test_what_a_killed_try_did_not_deliver_is_delivered_once(client, store):
    run_id = attempt(store, "late", [(1, 2.0)])
    box = Outbox.keyed(store.outboxes, "late")  # a try that was killed before MLflow heard of it
    own = {"toolkit.key": "late"}
    box.put("create", store=store.described(), experiment="demo", name="train", start_ms=1, tags=own,
            again=True)  # fmt: skip
    for step, loss in [(1, 2.0), (2, 1.5)]:
        box.put("metrics", step=step, ms=1000 + step, metrics={"loss": loss})
    box.release()
    attempt(store, "late", [(1, 2.0), (2, 1.5), (3, 1.0)], "finish")
    assert curve(client, run_id) == [(1, 2.0), (2, 1.5), (3, 1.0)]


def test_a_run_that_nobody_goes_on_with_asks_for_no_history(store, monkeypatch):
    from mlflow.tracking import MlflowClient

    asked = []
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *_: asked.append(1) or [])
    attempt(store, "whole", [(n, 1 / n) for n in range(1, 50)], "finish")
    assert asked == []
