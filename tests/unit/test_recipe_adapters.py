"""Adapters of a recipe: folders, registered versions, canaries; what a plan and preflight look at."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.adapter_folders import write_adapter, write_base
from toolkit.observe import local_files
from toolkit.plan import Observed, make_plan
from toolkit.preflight import gather
from toolkit.recipe import Recipe
from toolkit.recipe.adapters import AdapterSection, parse_registered
from toolkit.recipe.load import Loaded

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
