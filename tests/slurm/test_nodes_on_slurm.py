"""A training on two nodes through Slurm, torchrun between the shims: preempted, a rank killed, the same in the end."""

import os
import signal

import pytest
import yaml

from tests.contract.test_ranks import ORDER, as_if_never_interrupted, base, kept, references
from tests.contract.test_recipe import _steps, _wait, train_python
from tests.slurm.test_recipe_on_slurm import OnSlurm
from toolkit.launch.folder import JobFolder

pytestmark = [pytest.mark.integration, pytest.mark.slow]
__all__ = ["base", "references"]  # fixtures

NODES = {
    "nodes": {"count": 2},
    "variables": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
}


@pytest.fixture
def project(slurm, tmp_path, base):
    made = OnSlurm(tmp_path / "it's a $project", base, train_python())
    profile = yaml.safe_load((made.folder / "fake.yaml").read_text())
    (made.folder / "fake.yaml").write_text(yaml.safe_dump(profile | NODES))
    yield made
    made.close()


def test_two_nodes_that_are_interrupted_train_what_one_process_trains(slurm, project, references):
    chain = project.toolkit(*ORDER, "--on", "fake.yaml", "--detach").strip()
    train = JobFolder(project.jobs / chain / f"{chain}-03-train")
    assert train.spec.resources.nodes == 2
    number = train.submitted["id"].partition("@")[0]
    _wait(lambda: len(train.attempts) == 1 and _steps(project) > 4, train)
    slurm.ask("scontrol", "requeue", number)
    _wait(lambda: len(train.attempts) == 2 and _steps(project) > kept(train), train)
    os.kill(min(slurm.job_processes(number, b"SLURM_NODEID=1", b"RANK=1")), signal.SIGKILL)
    project.toolkit("jobs", "wait", chain)
    as_if_never_interrupted(project, train, references)
    for attempt in train.attempts:
        assert "node 1 of 2: 1 of 2 ranks" in attempt.log(1).read_text()
