"""Traces in a real MLflow store, and what happens when there is none."""

import os
import time

import pytest

from toolkit.gateway.exchange import Exchange
from toolkit.gateway.table import Target
from toolkit.gateway.traces import Traces

pytestmark = pytest.mark.integration  # makes an MLflow store

TARGET = Target("t@1", "adapter", "1" * 16, run_id="r")


@pytest.fixture(autouse=True)
def own_store(monkeypatch):
    """MLflow keeps the store it was told of, in the environment too: the tests that follow have their own."""
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def ended(**more):
    exchange = Exchange("/v1/chat/completions", "req-1", **more)
    exchange.model, exchange.target, exchange.status = "tickets", TARGET, 200
    exchange.prompt_tokens, exchange.completion_tokens = 7, 6
    exchange.ended_at = exchange.begun_at + 1.5
    return exchange


def test_each_request_becomes_a_trace_with_counts_and_without_texts(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    traces = Traces(uri, "demo")
    traces.start()
    traces.put(ended())
    failed = ended()
    failed.id, failed.status, failed.code = "req-2", 502, "engine_died"
    traces.put(failed)
    spoken = ended(asked={"messages": "my words"}, answer=[b"their words"])
    spoken.id = "req-3"
    traces.put(spoken)
    traces.close(60)
    assert traces.dropped == 0

    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("serving/demo").experiment_id
    found = {t.info.tags["request_id"]: t for t in client.search_traces(locations=[experiment])}
    assert set(found) == {"req-1", "req-2", "req-3"}
    root = found["req-1"].data.spans[0]
    assert (root.attributes["prompt_tokens"], root.attributes["completion_tokens"]) == (7, 6)
    assert found["req-1"].info.tags["version"] == "1" * 16
    assert found["req-1"].info.execution_duration == 1500
    assert found["req-1"].info.state == "OK"
    assert found["req-2"].info.state == "ERROR"
    assert root.inputs is None
    assert found["req-3"].data.spans[0].inputs == {"messages": "my words"}
    assert found["req-3"].data.spans[0].outputs == "their words"


def test_store_that_is_away_costs_traces_and_no_time(tmp_path):
    (tmp_path / "file").write_text("")
    traces = Traces(f"sqlite:///{tmp_path}/file/mlflow.db", "demo")
    traces.start()
    begun = time.perf_counter()
    for _ in range(1500):
        traces.put(ended())
    assert time.perf_counter() - begun < 5
    traces.close(60)
    assert traces.dropped == 1500
