"""A real training as jobs: one MLflow run over its attempts, the snapshot, the same adapter in the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.contract.world import World
from toolkit import environments
from toolkit.launch import actions, report
from toolkit.launch.folder import JobFolder

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROWS = """
def rows(count=60, seed=1):
    colours = ("red", "green", "blue")
    return [
        {"messages": [
            {"role": "user", "content": f"Which colour has apple {n * seed}?"},
            {"role": "assistant", "content": f"It is {colours[n % 3]}."},
        ]}
        for n in range(count)
    ]
"""
RECIPE = {
    "name": "colours",
    "model": {"source": "./base", "max_length": 64},
    "data": {
        "sources": [{"python": "rows.py:rows", "arguments": {"count": 60}}],
        "heldout": {"sources": [{"python": "rows.py:rows", "arguments": {"count": 6, "seed": 7}}]},
    },
    "train": {
        "method": "lora",
        "lora": {"rank": 4, "alpha": 8, "targets": "all-linear"},
        "max_steps": 40,
        "batch_size": 2,
        "learning_rate": 1.0e-2,
        "checkpoint_every": 2,
        "log_every": 1,
    },
}


def train_python() -> str:
    """An interpreter with torch: the built training environment, or ``TOOLKIT_TEST_TRAIN_PYTHON``."""
    given = os.environ.get("TOOLKIT_TEST_TRAIN_PYTHON")
    built = environments.resolve("train", accelerator="cpu")
    if not given and not built.is_ready:
        pytest.skip("the training environment is not built: toolkit env sync train-cpu")
    return given or str(built.python)


class Project:
    """A recipe in a folder of its own, with a workspace and a profile beside it."""

    def __init__(self, folder: Path, base: Path, python: str) -> None:
        self.folder = folder
        folder.mkdir()
        shutil.copytree(base, folder / "base")
        (folder / "rows.py").write_text(ROWS)
        (folder / "colours.yaml").write_text(yaml.safe_dump(RECIPE))
        profile = {
            "name": "here",
            "accelerator": "cpu",
            "grace_s": 60,
            "retries": 2,
            "environments": {"train": {"python": python}},
            "local": {"slots": 1, "folder": str(folder / "places")},
        }
        (folder / "here.yaml").write_text(yaml.safe_dump(profile))

    def toolkit(self, *arguments: str, code: int = 0) -> str:
        return self.run(*arguments, code=code).stdout

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """``toolkit ARGUMENTS`` in the project's folder, which must end with ``code``."""
        done = subprocess.run(
            [sys.executable, "-m", "toolkit", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == code, done.stderr[-3000:]
        return done

    @property
    def jobs(self) -> Path:
        return self.folder / "runs" / "jobs"

    def close(self) -> None:
        for chain in report.chains(self.jobs):
            actions.cancel(self.jobs, {chain["id"]: list(chain["jobs"])})
        World(self.folder).close()


def tiny_base(folder: Path) -> Path:
    """``folder``, with a small model that the training environment makes there."""
    script = Path(__file__).with_name("tiny_model.py")
    subprocess.run([train_python(), str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def project(tmp_path_factory, base):
    made = Project(tmp_path_factory.mktemp("jobs") / "it's a $project", base, train_python())
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """The same recipe in one process, never interrupted: its adapter and its losses."""
    made = Project(tmp_path_factory.mktemp("whole") / "project", base, train_python())
    made.toolkit("train", "colours.yaml", "--profile", "here.yaml")
    return _trained(made)


@pytest.fixture(scope="module")
def interrupted(project):
    """Submitted, its files changed, preempted once and killed once; the chain's id."""
    shown = project.toolkit("train", "colours.yaml", "--on", "here.yaml", "--dry-run", "--json")
    chain = project.toolkit("train", "colours.yaml", "--on", "here.yaml", "--detach").strip()
    (project.folder / "rows.py").write_text("raise RuntimeError('edited after it was submitted')")
    (project.folder / "colours.yaml").write_text("name: other")
    train = JobFolder(project.jobs / chain / f"{chain}-03-train")
    for attempt, number in ((1, signal.SIGTERM), (2, signal.SIGKILL)):
        _wait(lambda n=attempt: len(train.attempts) == n and _steps(project) > 4 * n, train)
        begun = train.attempts[-1].started
        target = begun["pid"] if number == signal.SIGTERM else _stage(begun["pid"])
        os.kill(target, number)
    project.toolkit("jobs", "wait", chain)
    return chain, json.loads(shown)


def test_it_ends_as_if_nobody_had_interrupted_it(interrupted, project, whole):
    adapter, losses = _trained(project)
    assert losses == whole[1]
    assert adapter == whole[0]


def test_all_attempts_are_one_mlflow_run_with_each_step_once(interrupted, project):
    from toolkit.tracking.client import connect
    from toolkit.tracking.store import resolve
    from toolkit.workspace import Workspace

    client = connect(resolve(None, Workspace(project.folder / "runs")))
    experiment = client.get_experiment_by_name("colours").experiment_id
    runs = client.search_runs([experiment])
    assert sorted(run.info.run_name for run in runs) == ["colours", "data", "fetch", "train"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    train = next(run for run in runs if run.info.run_name == "train")
    parent = next(run for run in runs if run.info.run_name == "colours")
    assert train.data.tags["mlflow.parentRunId"] == parent.info.run_id
    steps = [m.step for m in client.get_metric_history(train.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, 41))  # what was done twice stands once
    assert "toolkit.error" not in train.data.tags


def test_the_causes_of_its_attempts_are_told(interrupted, project):
    chain, _ = interrupted
    (shown,) = json.loads(project.toolkit("jobs", "show", f"{chain}-03-train", "--json"))
    assert [attempt["ended"]["cause"] for attempt in shown["tries"]] == [
        "preempted",
        "lost",
        "done",
    ]
    assert shown["state"] == "succeeded"


def test_what_the_dry_run_showed_was_submitted_byte_for_byte(interrupted, project):
    chain, shown = interrupted
    sent = [JobFolder(project.jobs / chain / job["job"]).submitted["text"] for job in shown]
    assert sent == [job["text"] for job in shown]


def test_the_log_has_all_attempts(interrupted, project):
    chain, _ = interrupted
    text = project.toolkit("jobs", "logs", f"{chain}-03-train")
    assert text.count("starting") >= 3
    assert "done" in text


def _trained(project: Project) -> tuple[bytes, list]:
    (folder,) = (project.folder / "runs" / "artifacts" / "train").iterdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [(m["step"], m["metrics"].get("loss")) for m in map(json.loads, lines)]
    return (folder / "adapter_model.safetensors").read_bytes(), losses


def _steps(project: Project) -> int:
    parts = (project.folder / "runs" / "artifacts" / "train").glob("*.part/metrics.jsonl")
    return sum(len(path.read_text().splitlines()) for path in parts)


def _stage(shim: int) -> int:
    """The stage's process: below the worker, which is below the shim."""
    from toolkit.engines.guard import descendants

    for pid in descendants(shim):
        if b"stages/__main__.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("no stage")


def _wait(condition, train: JobFolder, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        ends = [attempt.ended for attempt in train.attempts]
        assert time.monotonic() < end, ends
        time.sleep(0.1)
