"""One training on two nodes through Slurm: torchrun between the shims, preempted in the middle, the same in the end."""

import json
import re

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


def test_two_nodes_that_slurm_preempts_train_what_one_process_trains(slurm, project, references):
    one, two = references
    chain = project.toolkit(*ORDER, "--on", "fake.yaml", "--detach").strip()
    train = JobFolder(project.jobs / chain / f"{chain}-03-train")
    assert train.spec.resources.nodes == 2
    _wait(lambda: len(train.attempts) == 1 and _steps(project) > 4, train)
    slurm.ask("scontrol", "requeue", train.submitted["id"].partition("@")[0])
    project.toolkit("jobs", "wait", chain)
    assert [one.ended["cause"] for one in train.attempts] == ["preempted", "done"]
    assert train.attempts[0].ended["kept"]
    (made,) = _trained(project)
    assert made == two
    assert [step for step, _ in made[1]] == [step for step, _ in one[1]]
    for (_, loss), (_, alone) in zip(made[1], one[1], strict=True):
        assert loss == pytest.approx(alone, abs=TOLERANCE)
    assert _ranks(project) == 2
    log = project.toolkit("jobs", "logs", f"{chain}-03-train")
    assert log.count("node 1 of 2: 1 of 2 ranks") == 2  # in both attempts
    (kept,) = re.findall(rf"going on after step (\d+) of {STEPS}", log)
    assert 0 < int(kept) < STEPS
    runs = _runs(project)
    assert set(runs) == {"colours", "data", "fetch", "train"}
    assert _logged(project, runs["train"]) == list(range(1, STEPS + 1))  # no step done twice


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
