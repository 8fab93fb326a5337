"""A plan is a pure function of the recipe and of digests; fingerprints move exactly when bytes would."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.plan import UNIDENTIFIED, Observed, Plan, make_plan
from toolkit.recipe import Recipe
from toolkit.recipe.load import Loaded
from toolkit.survey import flatten

FILES = {"./base": "a" * 64, "rows.jsonl": "b" * 64}
ENVIRONMENTS = {"train": "t", "quantize": "q", "vllm": "v"}

BASE: dict[str, Any] = {
    "name": "small",
    "model": {"source": "./base"},
    "data": {"sources": [{"path": "rows.jsonl"}]},
    "train": {},
    "export": {},
    "quantize": [{"method": "gptq"}],
    "evaluate": {},
    "serve": {"models": ["tuned", "gptq"]},
}


def plan_of(environments: dict[str, str] | None = None, **changes: Any) -> Plan:
    recipe = Recipe.model_validate(BASE | changes)
    return make_plan(Loaded(recipe, Path("r.yaml")), Observed(FILES, environments or ENVIRONMENTS))


def changed(before: Plan, after: Plan) -> set[str]:
    prints = {s.name: s.fingerprint for s in before.steps}
    return {s.name for s in after.steps if prints.get(s.name) != s.fingerprint}


def test_the_steps_of_a_whole_recipe_stand_in_order():
    assert [s.name for s in plan_of().steps] == [
        "fetch", "data", "evaluate-base", "train", "export-adapter", "evaluate-tuned", "export-merged",
        "quantize-gptq", "evaluate-gptq", "serve-tuned", "serve-gptq",
    ]  # fmt: skip


def test_a_served_adapter_stands_on_the_base_and_a_quantized_model_on_the_merged_one():
    plan = plan_of()
    assert plan.step("serve-tuned").inputs == {
        "dataset": "data", "model": "fetch", "adapter": "export-adapter"
    }  # fmt: skip
    assert plan.step("quantize-gptq").inputs == {"model": "export-merged", "dataset": "data"}
    assert plan.step("serve-gptq").inputs == {"dataset": "data", "model": "quantize-gptq"}


def test_full_training_is_served_without_an_adapter():
    plan = plan_of(train={"method": "full"}, export={"formats": ["merged"]})
    assert "export-adapter" not in [s.name for s in plan.steps]
    assert plan.step("serve-tuned").inputs["model"] == "export-merged"


def test_quantize_only_starts_at_the_fetched_model():
    recipe = Recipe.model_validate(
        {"name": "q", "model": {"source": "./base"}, "quantize": [{"method": "awq"}]}
    )
    plan = make_plan(Loaded(recipe, Path("r.yaml")), Observed(FILES, ENVIRONMENTS))
    assert [(s.name, s.inputs) for s in plan.steps] == [
        ("fetch", {}), ("quantize-awq", {"model": "fetch"})
    ]  # fmt: skip


def test_a_new_learning_rate_changes_training_and_what_follows_from_it():
    assert changed(plan_of(), plan_of(train={"learning_rate": 3e-4})) == {
        "train", "export-adapter", "export-merged", "evaluate-tuned", "quantize-gptq", "evaluate-gptq",
        "serve-tuned", "serve-gptq",
    }  # fmt: skip


def test_a_gate_a_port_and_a_timeout_change_nothing():
    gate = {"of": "tuned", "metric": "exact_match", "min": 0.9}
    serve = BASE["serve"] | {"port": 9001, "start_timeout_s": 5}
    assert changed(plan_of(), plan_of(evaluate={"gates": [gate]}, serve=serve)) == set()


def test_what_changes_nothing_is_told_to_the_stage_all_the_same():
    serve = BASE["serve"] | {"port": 9001, "start_timeout_s": 5}
    changes = {"train": {"checkpoint_every": 7}, "serve": serve, "evaluate": {"through": "engine"}}
    plan = plan_of(**changes)
    assert plan.step("serve-tuned").config["serve"]["start_timeout_s"] == 5
    assert plan.step("evaluate-tuned").config["engine"]["start_timeout_s"] == 5
    assert plan.step("train").config["train"]["checkpoint_every"] == 7
    assert "port" not in plan.step("serve-tuned").identity["config"]["serve"]
    assert changed(plan_of(evaluate={"through": "engine"}), plan) == set()


def test_every_key_that_identifies_nothing_is_a_key_of_its_stage():
    plan = plan_of(evaluate={"through": "engine"})
    for stage, keys in UNIDENTIFIED.items():
        told = flatten(next(s for s in plan.steps if s.stage == stage).config)
        sections = {key.rpartition(".")[0] for key in told} | {
            ".".join(key.split(".")[:2]) for key in told
        }
        assert set(keys) <= told.keys() | sections


def test_what_an_evaluation_does_not_read_of_serving_changes_no_score():
    through = {"evaluate": {"through": "engine"}}
    serve = BASE["serve"] | {"questions": ["hi"], "name": "other"}
    found = changed(plan_of(**through), plan_of(**through, serve=serve))
    assert found == {"serve-tuned", "serve-gptq"}


def test_another_engine_lock_changes_only_what_the_engine_serves():
    assert changed(plan_of(), plan_of(ENVIRONMENTS | {"vllm": "other"})) == {
        "serve-tuned",
        "serve-gptq",
    }


def test_an_alias_that_moved_changes_the_base():
    recipe = Recipe.model_validate({"name": "r", "model": {"source": "models:/m@champion"}})
    plans = [
        make_plan(Loaded(recipe, Path("r.yaml")), Observed(source=f"models:/m/{version}"))
        for version in (1, 2)
    ]
    assert [p.step("fetch").config["source"] for p in plans] == ["models:/m/1", "models:/m/2"]
    assert changed(*plans) == {"fetch"}


def test_the_plan_is_cut_to_a_stage_and_all_it_needs():
    assert [s.name for s in plan_of().upto(("train",)).steps] == ["fetch", "data", "train"]
    assert [s.name for s in plan_of().upto(names=("serve-gptq",)).steps] == [
        "fetch", "data", "train", "export-merged", "quantize-gptq", "serve-gptq"
    ]  # fmt: skip


def test_a_stage_that_the_recipe_lacks_is_refused():
    with pytest.raises(UsageError) as caught:
        plan_of(quantize=[], serve=None).upto(("quantize",))
    assert "r.yaml has no step for quantize; its steps are fetch, data," in str(caught.value)
    assert "add a section `quantize:`" in (caught.value.hint or "")


@given(st.permutations(list(BASE)))
def test_the_order_of_keys_in_a_recipe_changes_no_fingerprint(keys):
    recipe = Recipe.model_validate({key: BASE[key] for key in keys})
    plan = make_plan(Loaded(recipe, Path("elsewhere/r.yaml")), Observed(FILES, ENVIRONMENTS))
    assert changed(plan_of(), plan) == set()


@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_fingerprints_are_equal_exactly_when_the_seed_is(one, other):
    assert (changed(plan_of(seed=one), plan_of(seed=other)) == set()) == (one == other)


def test_flatten_keeps_empty_lists_and_numbers_members():
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": []}) == {"a.b.0": 1, "a.b.1.c": 2, "d": []}
