"""The demo's recipes say what they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from toolkit.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.mark.parametrize("name", ["tickets", "tickets-qlora"])
def test_it_is_a_valid_recipe_with_a_schema_line(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.name == name
    assert text.startswith("# yaml-language-server: $schema=../recipe.schema.json\n")


def test_the_qlora_recipe_differs_only_in_name_method_and_epochs() -> None:
    lora, qlora = (
        yaml.safe_load((FOLDER / name).read_text())
        for name in ("tickets.yaml", "tickets-qlora.yaml")
    )
    assert qlora["train"].pop("method") == "qlora"
    assert lora["train"].pop("method") == "lora"
    assert (lora["train"].pop("epochs"), qlora["train"].pop("epochs")) == (1, 2)
    for key in ("name", "description"):
        assert lora.pop(key) != qlora.pop(key)
    assert lora == qlora
