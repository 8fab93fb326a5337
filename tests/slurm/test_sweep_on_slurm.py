"""A sweep of a real training through Slurm: what trials share runs once, then all others are one array."""

import json

import pytest
import yaml

from tests.contract.test_recipe import RECIPE, base, train_python
from tests.slurm.test_recipe_on_slurm import OnSlurm
from toolkit.launch.folder import JobFolder
from toolkit.sweep.folder import SweepFolder

pytestmark = [pytest.mark.integration, pytest.mark.slow]
__all__ = ["base"]  # a fixture


def test_trials_are_an_array_once_what_they_share_is_made(slurm, tmp_path, base):
    project = OnSlurm(tmp_path / "it's a $project", base, train_python())
    over = {"train.learning_rate": [1e-5, 1e-3, 1e-2]}
    sweep = {"over": over, "metric": "final_loss", "parallel": 2}
    recipe = RECIPE | {"train": RECIPE["train"] | {"max_steps": 3}, "sweep": sweep}
    (project.folder / "colours.yaml").write_text(yaml.safe_dump(recipe))
    try:
        shown = json.loads(project.toolkit("sweep", "colours.yaml", "--on", "fake.yaml", "--json"))
        assert [one["state"] for one in shown["trials"]] == ["succeeded"] * 3
        values = [one["value"] for one in shown["trials"]]
        assert shown["best"]["value"] == min(values)
        folder = SweepFolder(project.folder / "runs" / "sweeps" / shown["sweep"])
        steps = {
            one.number: sorted(
                path.parent for path in (project.jobs / one.chain).glob("*/job.json")
            )
            for one in folder.trials
            if one.chain
        }
        assert [len(steps[number]) for number in (1, 2, 3)] == [3, 1, 1]
        sent = {n: JobFolder(jobs[-1]).submitted or {} for n, jobs in steps.items()}
        assert "array" not in sent[1]
        assert sent[2]["array"] == sent[3]["array"]
        text = (project.jobs / "arrays" / f"{sent[2]['array']}.sh").read_text()
        assert "%2" in text
    finally:
        project.close()
