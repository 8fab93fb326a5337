"""``--frozen`` holds a run to ``toolkit.lock`` and shows every difference with both values."""

import json
from types import SimpleNamespace

import pytest

from tests.unit.test_plan import plan_of
from toolkit.artifact import Artifact
from toolkit.errors import DriftError, RecipeError
from toolkit.execute import run_plan
from toolkit.lock import NAME, Lock, planned
from toolkit.survey import StepStatus
from toolkit.workspace import Workspace


def prepared(folder, environments=None, **changes):
    plan = plan_of(**changes)
    locks = environments or {"train-cpu": "1" * 64}
    return SimpleNamespace(
        plan=plan,
        workspace=Workspace(folder / "runs"),
        loaded=SimpleNamespace(recipe=plan.recipe, path=folder / "r.yaml"),
        environments={n: SimpleNamespace(lock=n, digest=d) for n, d in locks.items()},
    )


BASE = Artifact(
    None,
    {"files": {"config.json": {"sha256": "c" * 64, "size": 1}}, "facts": {"template_sha256": "t"}},
)


@pytest.fixture
def locked(tmp_path):
    path = tmp_path / "r.yaml"
    Lock.beside(path).write(planned(prepared(tmp_path)), {"fetch": BASE})
    return path


def test_an_unchanged_recipe_is_frozen(locked, tmp_path):
    Lock.beside(locked).compare(planned(prepared(tmp_path)), frozen=True)
    Lock.beside(locked).compare_base(BASE, planned(prepared(tmp_path)), frozen=True)


def test_without_frozen_everything_may_change(locked, tmp_path):
    Lock.beside(locked).compare(planned(prepared(tmp_path, {"train-cpu": "2" * 64})), frozen=False)


def test_drift_is_refused_with_both_values(locked, tmp_path):
    with pytest.raises(DriftError) as caught:
        Lock.beside(locked).compare(
            planned(prepared(tmp_path, {"train-cpu": "2" * 64})), frozen=True
        )
    assert "environments.train-cpu: 111111111111… -> 222222222222…" in caught.value.message
    assert caught.value.hint == "run without --frozen to accept the change, and commit the new lock"


def test_another_base_file_is_refused(locked, tmp_path):
    other = Artifact(None, {"files": {"config.json": {"sha256": "d" * 64, "size": 1}}, "facts": {}})
    with pytest.raises(DriftError) as caught:
        Lock.beside(locked).compare_base(other, planned(prepared(tmp_path)), frozen=True)
    assert "base.files.config.json: cccccccccccc… -> dddddddddddd…" in caught.value.message
    assert "base.template_sha256: t -> nothing" in caught.value.message


def test_a_finished_run_is_held_to_the_locked_base_too(locked, tmp_path):
    other = Artifact(None, {"files": {"config.json": {"sha256": "d" * 64, "size": 1}}, "facts": {}})
    held = prepared(tmp_path)
    statuses = [StepStatus(held.plan.step("fetch"), other, "done")]
    with pytest.raises(DriftError, match=r"base\.files\.config\.json"):
        run_plan(held, statuses, lambda *_: None, frozen=True)


def test_an_environment_that_was_never_used_is_no_drift(locked, tmp_path):
    other = prepared(tmp_path, {"train-cpu": "1" * 64, "vllm-cuda": "9" * 64})
    Lock.beside(locked).compare(planned(other), frozen=True)


def test_frozen_without_a_lock_says_how_to_get_one(tmp_path):
    with pytest.raises(DriftError) as caught:
        Lock.beside(tmp_path / "r.yaml").compare(planned(prepared(tmp_path)), frozen=True)
    assert caught.value.hint == "run once without --frozen and commit toolkit.lock"


def test_recipes_of_one_folder_share_the_file(locked, tmp_path):
    Lock.beside(tmp_path / "other.yaml").write(planned(prepared(tmp_path)), {})
    assert set(json.loads((tmp_path / NAME).read_text())["recipes"]) == {"r.yaml", "other.yaml"}


def test_a_broken_lock_file_is_named(tmp_path):
    (tmp_path / NAME).write_text("{")
    with pytest.raises(RecipeError, match=r"toolkit\.lock: is not a lock file"):
        Lock.beside(tmp_path / "r.yaml")


def test_what_another_machine_computed_of_the_same_base_is_no_drift(locked, tmp_path):
    files = BASE.manifest["files"] | {"reference.json": {"sha256": "r" * 64, "size": 1}}
    there = Artifact(None, BASE.manifest | {"files": files})
    Lock.beside(locked).compare_base(there, planned(prepared(tmp_path)), frozen=True)
