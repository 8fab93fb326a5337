"""One training on two nodes through Slurm: torchrun between the shims, preempted in the middle, the same in the end."""

import json
import os
import re
import signal

import pytest
import yaml

from tests.contract.test_recipe import Project, _steps, _wait, base, train_python
from tests.slurm.test_recipe_on_slurm import OnSlurm, _runs
from toolkit.launch.folder import JobFolder
from toolkit.tracking.client import connect
from toolkit.tracking.store import resolve
from toolkit.workspace import Workspace

pytestmark = [pytest.mark.integration, pytest.mark.slow]
__all__ = ["base"]  # a fixture

LOOPBACK = {"variables": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}}
STEPS = 24
ORDER = ("train", "colours.yaml", "--set", f"train.max_steps={STEPS}")
ORDER += ("--set", "train.checkpoint_every=1000")  # only who is told to stop keeps one
TOLERANCE = 2e-4
"""Of a step's loss: two ranks add up in another order than one."""


@pytest.fixture(scope="module")
def references(tmp_path_factory, base):
    """Never interrupted, on this machine: one process with two passes a step, and two with one each."""
    project = Project(tmp_path_factory.mktemp("whole") / "project", base, train_python())
    here = yaml.safe_load((project.folder / "here.yaml").read_text())
    (project.folder / "two.yaml").write_text(yaml.safe_dump(here | {"processes": 2}))
    project.toolkit(*ORDER, "--set", "train.gradient_accumulation=2", "--profile", "here.yaml")
    (one,) = _trained(project)
    project.toolkit(*ORDER, "--profile", "two.yaml")
    (two,) = (made for made in _trained(project) if made != one)
    return one, two


@pytest.fixture
def project(slurm, tmp_path, base):
    made = OnSlurm(tmp_path / "it's a $project", base, train_python())
    profile = yaml.safe_load((made.folder / "fake.yaml").read_text())
    profile |= {"nodes": {"count": 2}} | LOOPBACK
    (made.folder / "fake.yaml").write_text(yaml.safe_dump(profile))
    yield made
    made.close()


@pytest.fixture
def interrupted(slurm, project):
    """Preempted in its first attempt; a rank of the other node killed in its second. The job, and its log."""
    chain = project.toolkit(*ORDER, "--on", "fake.yaml", "--detach").strip()
    train = JobFolder(project.jobs / chain / f"{chain}-03-train")
    assert train.spec.resources.nodes == 2
    number = train.submitted["id"].partition("@")[0]
    _wait(lambda: len(train.attempts) == 1 and _steps(project) > 4, train)
    slurm.ask("scontrol", "requeue", number)
    _wait(lambda: len(train.attempts) == 2 and _steps(project) > _kept(train), train)
    (rank,) = slurm.job_processes(number, b"SLURM_NODEID=1", b"RANK=1")
    os.kill(rank, signal.SIGKILL)
    project.toolkit("jobs", "wait", chain)
    return train


def test_two_nodes_that_are_interrupted_train_what_one_process_trains(
    project, interrupted, references
):
    one, two = references
    ends = [attempt.ended for attempt in interrupted.attempts]
    assert [end["cause"] for end in ends] == ["preempted", "lost", "done"]
    assert ends[0]["kept"]
    assert ends[1]["message"].startswith("step train: rank 1 of 2 was ended by SIGKILL")
    assert _ranks(project) == 2
    (made,) = _trained(project)
    assert made == two
    assert [step for step, _ in made[1]] == [step for step, _ in one[1]]
    for (_, loss), (_, alone) in zip(made[1], one[1], strict=True):
        assert loss == pytest.approx(alone, abs=TOLERANCE)
    kept = _kept(interrupted)
    assert 0 < kept < STEPS
    runs = _runs(project)
    assert set(runs) == {"colours", "data", "fetch", "train"}
    logged = _logged(project, runs["train"])
    assert set(logged) == set(range(1, STEPS + 1))
    assert [n for n in logged if n <= kept] == list(range(1, kept + 1))  # none done twice
    for attempt in interrupted.attempts:
        assert "node 1 of 2: 1 of 2 ranks" in attempt.log(1).read_text()


def _kept(train):
    """After which step the second attempt went on."""
    found = re.search(rf"going on after step (\d+) of {STEPS}", train.attempts[1].log().read_text())
    return int(found[1]) if found else STEPS


def _trained(project):
    """Of each training in the workspace: the adapter, and the loss of each step."""
    for folder in (project.folder / "runs" / "artifacts" / "train").iterdir():
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses = [(m["step"], m["metrics"]["loss"]) for m in lines if "loss" in m["metrics"]]
        yield (folder / "adapter_model.safetensors").read_bytes(), losses


def _ranks(project):
    (manifest,) = (project.folder / "runs" / "artifacts" / "train").glob("*/manifest.json")
    return json.loads(manifest.read_text())["facts"]["ranks"]


def _logged(project, run):
    """Steps whose loss MLflow has, each as often as it was logged."""
    client = connect(resolve(None, Workspace(project.folder / "runs")))
    return sorted(point.step for point in client.get_metric_history(run, "loss"))
