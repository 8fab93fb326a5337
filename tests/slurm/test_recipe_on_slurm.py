"""A real training through Slurm: taken off its place in the middle, and the same in the end."""

import json
import re

import pytest
import yaml

from tests.contract.test_ranks import runs_of
from tests.contract.test_recipe import Project, _steps, _trained, _wait, base, train_python, whole
from toolkit.launch.folder import JobFolder

pytestmark = [pytest.mark.integration, pytest.mark.slow]
__all__ = ["base", "whole"]  # fixtures


class OnSlurm(Project):
    """The recipe with a profile for Slurm."""

    def __init__(self, folder, base, python):
        super().__init__(folder, base, python)
        profile = {
            "name": "fake",
            "backend": "slurm",
            "accelerator": "cpu",
            "grace_s": 60,
            "retries": 2,
            "resources": {"cpus": 2, "memory_gib": 2, "time_limit": "30m"},
            "environments": {"train": {"python": python}},
            "slurm": {"partition": "main", "setup": ["export OMP_NUM_THREADS=2"]},
        }
        (folder / "fake.yaml").write_text(yaml.safe_dump(profile))


def test_a_training_that_slurm_preempts_ends_as_if_nobody_had(slurm, tmp_path, base, whole):
    project = OnSlurm(tmp_path / "it's a $project", base, train_python())
    try:
        alone = ("--set", "train.checkpoint_every=1000")  # only who is told to stop keeps one
        order = ("train", "colours.yaml", *alone, "--on", "fake.yaml")
        shown = json.loads(project.toolkit(*order, "--dry-run", "--json"))
        chain = project.toolkit(*order, "--detach").strip()
        train = JobFolder(project.jobs / chain / f"{chain}-03-train")
        _wait(lambda: len(train.attempts) == 1 and _steps(project) > 6, train)
        slurm.ask("scontrol", "requeue", train.submitted["id"].partition("@")[0])
        project.toolkit("jobs", "wait", chain)
        assert [one.ended["cause"] for one in train.attempts] == ["preempted", "done"]
        assert train.attempts[0].ended["kept"]
        assert _trained(project) == whole
        for one in shown:
            sent = JobFolder(project.jobs / chain / one["job"]).submitted["text"]
            numbered = re.sub(r'"afterok:<id of .*>"', "afterok:#", one["text"])
            assert re.sub(r"afterok:\d+", "afterok:#", sent) == numbered
        assert set(runs_of(project)) == {"colours", "data", "fetch", "train"}
    finally:
        project.close()
