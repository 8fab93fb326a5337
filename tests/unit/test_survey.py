"""What is done is not done again, and the plan says in the recipe's words why a step will run."""

from pathlib import Path

import pytest

from tests.unit.test_plan import ENVIRONMENTS, plan_of
from toolkit import artifact
from toolkit.plan import Plan
from toolkit.survey import survey
from toolkit.workspace import Workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


def finish(plan: Plan, workspace: Workspace, *names: str) -> None:
    """Put an artifact where each step would."""
    for name in names:
        step = plan.step(name)
        target = workspace.artifact(step.stage, step.fingerprint)
        part = artifact.part_of(target)
        part.mkdir(parents=True)
        (part / "file").write_text(name)
        manifest = {
            "fingerprint": step.fingerprint, "identity": step.identity, "recipe": plan.recipe.name,
            "step": name, "created": "2026-11-21T00:00:00+00:00", "metrics": {}, "facts": {},
        }  # fmt: skip
        artifact.publish(target, manifest)


def why(plan: Plan, workspace: Workspace) -> dict[str, str]:
    return {s.step.name: s.why for s in survey(plan, workspace)}


def test_in_an_empty_workspace_all_is_new(workspace):
    said = why(plan_of(), workspace)
    assert said["fetch"] == "new"
    assert said["train"] == "after fetch, data"


def test_a_finished_step_is_done(workspace):
    finish(plan_of(), workspace, "fetch", "data")
    said = why(plan_of(), workspace)
    assert (said["fetch"], said["data"], said["train"]) == ("done", "done", "new")


def test_a_changed_value_is_named_with_both_values(workspace):
    finish(plan_of(), workspace, "fetch", "data", "train")
    said = why(plan_of(train={"learning_rate": 1e-3, "lora": {"rank": 4}}), workspace)
    assert said["train"] == "train.learning_rate 0.0002 -> 0.001; train.lora.rank 16 -> 4"


def test_a_changed_input_and_a_changed_environment_are_named(workspace):
    before = plan_of()
    finish(before, workspace, *[s.name for s in before.steps])
    said = why(plan_of(ENVIRONMENTS | {"vllm": "new"}, seed=3), workspace)
    assert said["fetch"] == "done"
    assert said["data"] == "seed 0 -> 3"
    assert said["export-adapter"] == "train changed; data changed"
    assert "vllm changed" in said["serve-tuned"]


def test_a_damaged_artifact_is_made_again(workspace):
    plan = plan_of()
    finish(plan, workspace, "fetch")
    step = plan.step("fetch")
    (Path(workspace.artifact("fetch", step.fingerprint)) / "file").unlink()
    assert why(plan, workspace)["fetch"] == "its artifact is damaged: file is missing"
