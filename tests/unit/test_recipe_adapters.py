"""Adapters of a recipe: folders, registered versions, canaries; what a plan and preflight look at."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.adapter_folders import write_adapter, write_base
from toolkit.engines.foreground import adapter_paths
from toolkit.observe import local_files, observe
from toolkit.plan import Observed, make_plan
from toolkit.preflight import gather
from toolkit.recipe import Recipe
from toolkit.recipe.adapters import AdapterSection, parse_registered
from toolkit.recipe.load import Loaded
from toolkit.serving.registry import ModelRegistry
from toolkit.serving.sources import of_recipe
from toolkit.stages import Input, Kind
from toolkit.tracking.store import resolve
from toolkit.workspace import Workspace

CANARY = {"path": "./b", "weight": 0.25, "header": "next"}


def recipe(*adapters: dict[str, Any]) -> Recipe:
    serve = {"models": ["base"], "adapters": adapters}
    return Recipe.model_validate({"name": "r", "model": {"source": "./base"}, "serve": serve})


def test_registered_adapters_are_named_by_version_or_alias() -> None:
    assert parse_registered("models:/tickets/3") == ("tickets", "3", None)
    assert parse_registered("models:/tickets@champion") == ("tickets", None, "champion")


@pytest.mark.parametrize("text", ["models:/tickets", "models:/tickets/latest", "models:/a/b/1"])
def test_what_moves_without_notice_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="write models:/NAME/VERSION or models:/NAME@ALIAS"):
        AdapterSection(name="a", path=text)


def test_a_canary_has_a_share_and_a_name_of_its_own() -> None:
    with pytest.raises(ValidationError, match="give the canary a name of its own"):
        recipe({"name": "a", "path": "./a", "canary": CANARY | {"header": "stable"}})
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        recipe({"name": "a", "path": "./a", "canary": CANARY | {"weight": 10}})


def test_a_plan_digests_folders_and_leaves_the_registry_alone() -> None:
    made = recipe(
        {"name": "a", "path": "./a", "canary": CANARY},
        {"name": "c", "path": "models:/c@champion"},
    )
    assert [path for path, _ in local_files(made)] == ["./base", "./a", "./b"]
    digests = {"./base": "0" * 64, "./a": "a" * 64, "./b": "b" * 64}
    plan = make_plan(Loaded(made, Path("r.yaml")), Observed(digests, {"vllm": "v"}))
    assert plan.step("serve-base").config["digests"] == {"./a": "a" * 64, "./b": "b" * 64}


def test_preflight_looks_at_canaries_too(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", seed=1)
    write_adapter(tmp_path / "b", seed=2, rank=8)
    facts = gather(recipe({"name": "a", "path": "./a", "canary": CANARY}), tmp_path)
    assert {name: adapter.rank for name, adapter in facts.adapters.items()} == {"a": 4, "a next": 8}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Loaded:
    """`a` brings no word of the training side, its canary does."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", seed=1)
    (write_adapter(tmp_path / "b", seed=2) / "reference.json").write_text("{}")
    made = recipe({"name": "a", "path": "./a", "canary": CANARY})
    return Loaded(made, tmp_path / "r.yaml")


def test_an_adapter_from_elsewhere_gets_a_step_that_asks_the_training_side(
    elsewhere: Loaded,
) -> None:
    plan = make_plan(elsewhere, observe(elsewhere, {}))
    assert [step.name for step in plan.steps] == ["fetch", "reference-a", "serve-base"]
    step = plan.step("reference-a")
    assert (step.environments, step.inputs) == (("train",), {"model": "fetch"})
    assert plan.step("serve-base").inputs == {"model": "fetch", "adapter a": "reference-a"}


def test_without_a_training_environment_it_is_served_as_it_is_unless_agreement_is_required(
    elsewhere: Loaded,
) -> None:
    plan = make_plan(elsewhere, observe(elsewhere, {}, trains=False))
    assert [step.name for step in plan.steps] == ["fetch", "serve-base"]
    serve = elsewhere.recipe.serve
    assert serve is not None
    proof = serve.proof.model_copy(update={"agreement": "required"})
    strict = serve.model_copy(update={"proof": proof})
    required = Loaded(elsewhere.recipe.model_copy(update={"serve": strict}), elsewhere.path)
    plan = make_plan(required, observe(required, {}, trains=False))
    assert "reference-a" in [step.name for step in plan.steps]


def test_the_reference_is_made_on_the_complete_base_of_what_is_served() -> None:
    made = Recipe.model_validate(
        {
            "name": "r",
            "model": {"source": "./base"},
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "train": {},
            "quantize": [{"method": "awq", "of": "base"}, {"method": "gptq"}],
            "serve": {
                "models": ["tuned", "tuned@awq", "gptq"],
                "adapters": [{"name": "a", "path": "./a"}],
            },
        }
    )
    files = dict.fromkeys(("./base", "rows.jsonl", "./a"), "0")
    observed = Observed(files, {}, unproven=frozenset({"./a"}))
    plan = make_plan(Loaded(made, Path("r.yaml")), observed)
    assert plan.step("reference-a").inputs == {"model": "fetch", "dataset": "data"}
    assert plan.step("reference-a-merged").inputs["model"] == "export-merged"
    by_subject = {s: plan.step(f"serve-{s}").inputs["adapter a"] for s in made.served}
    assert by_subject == {
        "tuned": "reference-a", "tuned@awq": "reference-a", "gptq": "reference-a-merged",
    }  # fmt: skip


def test_the_folder_with_the_reference_is_the_one_that_is_served(
    elsewhere: Loaded, tmp_path: Path
) -> None:
    made = write_adapter(tmp_path / "runs" / "artifacts" / "reference" / "1", seed=1)
    (made / "reference.json").write_text("{}")
    serve = elsewhere.recipe.serve
    assert serve is not None
    space = Workspace(tmp_path / "runs")
    registry = ModelRegistry(resolve(None, space), space)
    stable, canary = of_recipe(serve, None, tmp_path, registry, {"a": made})
    assert (stable.path, stable.source) == (str(made), str(tmp_path / "a"))
    assert canary.source == str(tmp_path / "b")
    inputs = {"adapter a": Input(made, Kind.adapter, "1")}
    assert adapter_paths(inputs, serve, "r", tmp_path) == {"a": made}
    assert adapter_paths({}, serve, "r", tmp_path) == {"a": tmp_path / "a"}
