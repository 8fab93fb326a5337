"""One run of the real thing: real weights, real GPTQ, a real vLLM, a real MLflow store.

The demo recipe, made small by ``--set``: every stage runs, quality is not judged here. It takes minutes on
two cores, so all tests that need a finished run of the recipe are in this file and share one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_tutorial import RECIPE, follow

pytestmark = pytest.mark.integration

SMALL = (
    "data.sources.0.arguments.rows=96",
    "data.heldout.sources.0.arguments.rows=8",
    "train.max_steps=6",
    "train.checkpoint_every=2",
    "evaluate.max_rows=6",
    "evaluate.max_new_tokens=8",
    "evaluate.gates=[]",
    "quantize.0.calibration.rows=8",
    "serve.port=0",
    'serve.questions=["My hammock tore, order 48213."]',
)

STEPS = [
    "fetch", "data", "evaluate-base", "train", "export-adapter", "evaluate-tuned", "export-merged",
    "quantize-gptq", "evaluate-gptq", "serve-tuned", "serve-gptq",
]  # fmt: skip


def command(workspace: Path, *arguments: str) -> list[str]:
    sets = [part for value in SMALL for part in ("--set", value)]
    verb, *rest = arguments
    head = [sys.executable, "-m", "toolkit", verb, str(workspace.with_name("tickets.yaml"))]
    return [*head, *sets, *rest, "--workspace", str(workspace)]


def toolkit(workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(workspace, *arguments), capture_output=True, text=True, timeout=2400, check=False
    )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A workspace beside a copy of the demo recipe, as a user would start."""
    folder = tmp_path_factory.mktemp("project")
    start = [sys.executable, "-m", "toolkit", "init", str(folder / "tickets.yaml")]
    subprocess.run(start, check=True, capture_output=True)
    return folder / "runs"


@pytest.fixture(scope="session")
def interrupted(workspace):
    """A worker killed with -9 in the middle of training; what it left."""
    process = subprocess.Popen(
        command(workspace, "run", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 1200
    checkpoints = workspace / "state" / "train"
    while time.monotonic() < deadline and process.poll() is None:
        if list(checkpoints.glob("*/checkpoints/*/*")):
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"no checkpoint was written; the run said {process.communicate()[1][-3000:]}")
    stage = stage_process(workspace)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return stage


def stage_process(workspace: Path) -> int:
    """The process that runs a stage of this workspace."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"stages/__main__.py" in line and str(workspace).encode() in line:
            return int(folder.name)
    pytest.fail("no stage process runs")


@pytest.fixture(scope="session")
def finished(workspace, interrupted) -> dict[str, dict]:
    """The same run again, to its end: ``toolkit run --json``, steps by name."""
    done = toolkit(workspace, "run", "--json")
    assert done.returncode == 0, done.stderr[-5000:]
    return {s["name"]: s for s in json.loads(done.stdout)["steps"]}


def test_a_kill_leaves_no_orphan_and_no_half_artifact(workspace, interrupted):
    deadline = time.monotonic() + 10
    while Path(f"/proc/{interrupted}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{interrupted}").exists()
    complete = [p for p in (workspace / "artifacts" / "train").glob("*") if p.suffix != ".part"]
    assert complete == [] or (complete[0] / "manifest.json").exists()


def test_the_next_run_goes_on_from_the_checkpoint(workspace, finished):
    assert list(finished) == STEPS
    assert finished["fetch"]["cached"]
    assert finished["data"]["cached"]
    lines = (Path(finished["train"]["artifact"]) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)["metrics"]]
    assert steps == list(range(1, 7))


def test_the_second_run_is_free(workspace, finished):
    start = time.monotonic()
    done = toolkit(workspace, "run", "--json")
    assert done.returncode == 0, done.stderr
    assert all(s["cached"] for s in json.loads(done.stdout)["steps"])
    assert time.monotonic() - start < 30


def test_plan_says_done_and_why_not(workspace, finished):
    done = toolkit(workspace, "plan", "--json")
    assert {s["state"] for s in json.loads(done.stdout)["steps"]} == {"done"}
    again = toolkit(workspace, "plan", "--json", "--set", "train.learning_rate=0.5")
    why = {s["name"]: s["why"] for s in json.loads(again.stdout)["steps"] if s["state"] == "run"}
    assert "train.learning_rate" in why["train"]
    assert "-> 0.5" in why["train"]
    assert "fetch" not in why


def test_a_damaged_artifact_is_made_again(workspace, finished):
    folder = Path(finished["export-adapter"]["artifact"])
    (folder / "adapter_config.json").write_text("{}")
    done = toolkit(workspace, "plan", "--json")
    why = {s["name"]: s["why"] for s in json.loads(done.stdout)["steps"]}
    assert "adapter_config.json" in why["export-adapter"]
    assert toolkit(workspace, "export", "--json").returncode == 0
    assert "r" in json.loads((folder / "adapter_config.json").read_text())


def test_every_model_answered_through_the_engine(finished):
    for name in ("serve-tuned", "serve-gptq"):
        answers = json.loads((Path(finished[name]["artifact"]) / "answers.json").read_text())
        assert len(answers) >= 1
        assert all(a["answer"].strip() for a in answers)


def test_the_quantized_model_is_smaller_and_says_how_it_was_made(finished):
    merged, small = (Path(finished[n]["artifact"]) for n in ("export-merged", "quantize-gptq"))
    manifest = json.loads((small / "quantization.json").read_text())
    assert (manifest["method"], manifest["bits"], manifest["group_size"]) == ("gptq", 4, 64)
    assert weight_bytes(small) < 0.8 * weight_bytes(merged)


def weight_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def mlflow_runs(workspace: Path) -> dict[str, dict]:
    """Every run of the store by id, read through MLflow's own API."""
    script = f"""
import json, mlflow
mlflow.set_tracking_uri("sqlite:///{workspace}/mlflow.db")
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("tickets")
runs = client.search_runs([experiment.experiment_id], max_results=1000)
print(json.dumps([dict(name=r.info.run_name, id=r.info.run_id, status=r.info.status,
  params=len(r.data.params), metrics=r.data.metrics,
  parent=r.data.tags.get("mlflow.parentRunId"), datasets=len(r.inputs.dataset_inputs),
  artifacts=[a.path for f in ("", "artifact") for a in client.list_artifacts(r.info.run_id, f)])
  for r in runs]))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {r["id"]: r for r in json.loads(out.stdout)}


def test_mlflow_holds_every_step(workspace, finished):
    runs = mlflow_runs(workspace)
    for name in STEPS:
        run = runs[finished[name]["mlflow_run"]]
        assert run["status"] == "FINISHED", name
        assert run["parent"] in runs, name
        assert run["params"] > 0, name
    train = runs[finished["train"]["mlflow_run"]]
    assert "loss" in train["metrics"]
    assert train["datasets"] >= 1
    assert any(a.endswith(".png") for a in train["artifacts"])


def test_two_runs_at_once_make_each_artifact_once(workspace, finished):
    changed = ("--json", "--set", "seed=9", "--set", "train.max_steps=1")
    both = [
        subprocess.Popen(
            command(workspace, "train", *changed),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    first, second = (json.loads(out)["steps"] for out, _ in said)
    assert [s["artifact"] for s in first] == [s["artifact"] for s in second]
    assert "another run is making this artifact" in said[0][1] + said[1][1]
    assert [s["mlflow_run"] for s in first] == [s["mlflow_run"] for s in second]


def test_a_failed_step_says_why_and_its_run_is_failed(workspace, finished):
    done = toolkit(workspace, "train", "--set", "model.max_length=40")
    assert done.returncode == 1
    assert "step data: " in done.stderr
    assert "Traceback" not in done.stderr
    runs = mlflow_runs(workspace)
    failed = [r for r in runs.values() if r["name"] == "data" and r["status"] == "FAILED"]
    assert len(failed) == 1
    assert "traceback.txt" in failed[0]["artifacts"]
    assert runs[failed[0]["parent"]]["status"] == "FAILED"


def test_frozen_accepts_the_lock_and_refuses_drift(workspace, finished):
    assert toolkit(workspace, "run", "--json", "--frozen").returncode == 0
    drifted = toolkit(workspace, "run", "--frozen", "--set", "model.sha256=" + "f" * 64)
    assert drifted.returncode == 2
    assert "model.sha256" in drifted.stderr
    assert "toolkit.lock" in drifted.stderr


@pytest.mark.timeout(3600)
def test_every_command_of_the_tutorial_works(workspace, finished, tmp_path):
    """The page from ``init`` to ``runs list``, as typed, with a copy of what the run of this file has made.

    It alone shows that the page's commands lead to a detached server that answers ``chat`` and stops, and that
    ``evaluate`` runs all of its steps by itself (fewer rows: none is cached). That fetching, training and quantizing
    begin from nothing is shown by ``finished``: the settings are the same, so here they are found done.
    """
    shutil.copytree(workspace, tmp_path / "runs")
    said = follow(tmp_path, (*SMALL, "evaluate.max_rows=4"))
    assert said[next(c for c in said if c.startswith("toolkit chat"))].strip()
    last_plan = said[f"toolkit plan {RECIPE}"]
    for step in ("fetch", "data", "train", "export-adapter", "evaluate-tuned"):
        assert re.search(rf"{step}\s+done", last_plan), last_plan
    assert (tmp_path / "toolkit.lock").is_file()
