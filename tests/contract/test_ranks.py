"""A training of two ranks as a job: preempted, then a rank killed, and in the end as if nobody had."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml

from tests.contract.test_recipe import Project, _steps, _wait, base, train_python
from toolkit.engines.guard import descendants
from toolkit.launch.folder import JobFolder
from toolkit.tracking.client import connect
from toolkit.tracking.store import resolve
from toolkit.workspace import Workspace

pytestmark = [pytest.mark.integration, pytest.mark.slow]
__all__ = ["base"]  # a fixture

STEPS = 40
ORDER = ("train", "colours.yaml", "--set", f"train.max_steps={STEPS}")
ORDER += ("--set", "train.checkpoint_every=1000")  # only who is told to stop keeps one
TOLERANCE = 2e-4
"""Of a step's loss: two ranks add up in another order than one."""


def two_ranks(project: Project) -> None:
    """A second profile for this machine: two processes that train together."""
    here = yaml.safe_load((project.folder / "here.yaml").read_text())
    (project.folder / "two.yaml").write_text(yaml.safe_dump(here | {"processes": 2}))


@pytest.fixture(scope="module")
def references(tmp_path_factory, base):
    """Never interrupted, no job: one process with two passes a step, and two with one each."""
    project = Project(tmp_path_factory.mktemp("whole") / "project", base, train_python())
    two_ranks(project)
    project.toolkit(*ORDER, "--set", "train.gradient_accumulation=2", "--profile", "here.yaml")
    (one,) = trained(project)
    project.toolkit(*ORDER, "--profile", "two.yaml")
    (two,) = (made for made in trained(project) if made != one)
    return one, two


def test_two_ranks_that_are_interrupted_train_what_one_process_trains(tmp_path, base, references):
    project = Project(tmp_path / "it's a $project", base, train_python())
    two_ranks(project)
    try:
        chain = project.toolkit(*ORDER, "--on", "two.yaml", "--detach").strip()
        train = JobFolder(project.jobs / chain / f"{chain}-03-train")
        _wait(lambda: len(train.attempts) == 1 and _steps(project) > 4, train)
        os.kill(train.attempts[0].started["pid"], signal.SIGTERM)
        _wait(lambda: len(train.attempts) == 2 and _steps(project) > kept(train), train)
        os.kill(_rank(train.attempts[1].started["pid"]), signal.SIGKILL)
        project.toolkit("jobs", "wait", chain)
        as_if_never_interrupted(project, train, references)
    finally:
        project.close()


def _rank(shim: int) -> int:
    """The process of rank 1."""
    return min(pid for pid in descendants(shim) if b"RANK=1" in _environ(pid))


def _environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def as_if_never_interrupted(project: Project, train: JobFolder, references) -> None:
    """Preempted, a rank killed, done: one MLflow run, each step once, the adapter and losses of an undisturbed run."""
    one, two = references
    ends = [attempt.ended for attempt in train.attempts]
    assert [end["cause"] for end in ends] == ["preempted", "lost", "done"]
    assert ends[0]["kept"]
    assert ends[1]["message"].startswith("step train: rank 1 of 2 was ended by SIGKILL")
    assert _ranks(project) == 2
    (made,) = trained(project)
    assert made == two
    assert [step for step, _ in made[1]] == [step for step, _ in one[1]]
    for (_, loss), (_, alone) in zip(made[1], one[1], strict=True):
        assert loss == pytest.approx(alone, abs=TOLERANCE)
    assert 0 < kept(train) < STEPS
    runs = runs_of(project)
    assert set(runs) == {"colours", "data", "fetch", "train"}
    client = connect(resolve(None, Workspace(project.folder / "runs")))
    points = sorted(point.step for point in client.get_metric_history(runs["train"], "loss"))
    assert points == list(range(1, STEPS + 1))


def kept(train: JobFolder) -> int:
    """After which step the second attempt went on; all of them as long as it did not say so."""
    log = train.attempts[1].log()
    text = log.read_text() if log.exists() else ""
    found = re.search(rf"going on after step (\d+) of {STEPS}", text)
    return int(found[1]) if found else STEPS


def trained(project: Project):
    """Of each training in the workspace: the adapter, and the loss of each step."""
    for folder in (project.folder / "runs" / "artifacts" / "train").iterdir():
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses = [(m["step"], m["metrics"]["loss"]) for m in lines if "loss" in m["metrics"]]
        yield (folder / "adapter_model.safetensors").read_bytes(), losses


def _ranks(project: Project) -> int:
    (manifest,) = (project.folder / "runs" / "artifacts" / "train").glob("*/manifest.json")
    return json.loads(manifest.read_text())["facts"]["ranks"]


def runs_of(project: Project) -> dict[str, str]:
    """The runs that MLflow has, name -> id; all are finished, and no step has two."""
    client = connect(resolve(None, Workspace(project.folder / "runs")))
    experiment = client.get_experiment_by_name("colours").experiment_id
    runs = client.search_runs([experiment])
    assert {run.info.status for run in runs} == {"FINISHED"}
    named = {run.info.run_name: run.info.run_id for run in runs}
    assert len(named) == len(runs)
    return named
