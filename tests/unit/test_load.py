"""Every mistake in a recipe is found at once, with its line and the likely key."""

from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe import Recipe
from toolkit.recipe.load import load
from toolkit.strict import all_keys

GOOD = """\
name: small
model:
  source: ./base
  max_length: 128
data:
  sources:
    - path: rows.jsonl
train:
  learning_rate: 1e-4
  lora:
    rank: 8
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(write(folder, text), overrides)
    return [str(p).replace(f"{folder}/", "") for p in caught.value.problems]


def test_a_good_recipe_loads(tmp_path):
    recipe = load(write(tmp_path, GOOD)).recipe
    assert recipe.train is not None
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.lora.rank == 8
    assert recipe.subjects == ("base", "tuned", "merged")


def test_a_misspelt_key_names_its_line_and_the_likely_key(tmp_path):
    assert problems(tmp_path, GOOD.replace("rank:", "rnak:")) == [
        "recipe.yaml:11: train.lora.rnak: is not a key here (did you mean 'rank'?)"
    ]


def test_a_key_in_the_wrong_section_names_the_right_one(tmp_path):
    text = GOOD.replace("  lora:\n    rank: 8\n", "  rank: 8\n")
    assert problems(tmp_path, text) == [
        "recipe.yaml:10: train.rank: is not a key here (did you mean 'train.lora.rank'?)"
    ]


def test_all_mistakes_come_at_once(tmp_path):
    text = GOOD.replace("rank: 8", "rank: 0").replace("max_length: 128", "max_lenght: 128")
    assert problems(tmp_path, text + "seed: [1]\n") == [
        "recipe.yaml:12: seed: Input should be a valid integer",
        "recipe.yaml:4: model.max_lenght: is not a key here (did you mean 'max_length'?)",
        "recipe.yaml:11: train.lora.rank: is 0: input should be greater than or equal to 1",
    ]


def test_a_misspelt_choice_names_the_likely_one(tmp_path):
    (line,) = problems(tmp_path, GOOD + "quantize:\n  - method: gtpq\n")
    assert line.startswith("recipe.yaml:13: quantize[0].method: is 'gtpq': input should be 'gptq'")
    assert line.endswith("(did you mean 'gptq'?)")


def test_a_missing_section_is_named(tmp_path):
    assert problems(tmp_path, "name: x\n") == ["recipe.yaml:1: model: is missing"]


def test_a_list_with_a_wrong_member_is_one_mistake(tmp_path):
    text = GOOD.replace("- path: rows.jsonl", "- {path: a, hub: b/c}")
    assert problems(tmp_path, text) == [
        "recipe.yaml:7: data.sources[0]: give exactly one of path, hub, python (given: path, hub)"
    ]


def test_a_key_that_stands_twice_is_refused(tmp_path):
    assert problems(tmp_path, GOOD + "name: other\n") == [
        "recipe.yaml:12: name: stands twice; first on line 1"
    ]


def test_broken_yaml_names_the_line(tmp_path):
    (line,) = problems(tmp_path, "name: x\nmodel: {source: [}\n")
    assert line.startswith("recipe.yaml:2: is not YAML: ")


def test_an_empty_file_and_a_list_are_refused(tmp_path):
    assert problems(tmp_path, "# nothing\n") == ["recipe.yaml: is empty"]
    assert problems(tmp_path, "- a\n") == ["recipe.yaml:1: is not a mapping of keys to values"]


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "none.yaml")
    assert "none.yaml: does not exist" in caught.value.message
    assert "toolkit init" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E3", 2e3), (".5", 0.5), ("1.", 1.0), ("3", 3.0)]
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value):
    recipe = load(write(tmp_path, GOOD), [f"train.learning_rate={text}"]).recipe
    assert recipe.train is not None
    assert recipe.train.learning_rate == value


def test_set_changes_nested_values_lists_and_absent_sections(tmp_path):
    overrides = ["train.lora.alpha=4", "data.sources.0.path=other.jsonl", "serve.port=0"]
    recipe = load(write(tmp_path, GOOD), overrides).recipe
    assert recipe.train is not None
    assert recipe.data is not None
    assert recipe.serve is not None
    assert recipe.train.lora.alpha == 4
    assert recipe.data.sources[0].path == "other.jsonl"
    assert recipe.serve.port == 0


def test_a_wrong_override_is_named_as_it_was_typed(tmp_path):
    assert problems(tmp_path, GOOD, "train.lora.rank=none") == [
        (
            "--set train.lora.rank=none: train.lora.rank: is 'none': input should be a valid integer, "
            "unable to parse string as an integer"
        )
    ]
    assert problems(tmp_path, GOOD, "train.lr=1") == [
        "--set train.lr=1: train.lr: is not a key here (did you mean 'learning_rate'?)"
    ]
    assert problems(tmp_path, GOOD, "train.zzz=1") == [
        "--set train.zzz=1: train.zzz: is not a key here; known: " + ", ".join(train_keys())
    ]
    assert problems(tmp_path, GOOD, "rank") == [
        "--set rank: is not KEY.PATH=VALUE, such as train.learning_rate=1e-4"
    ]
    assert problems(tmp_path, GOOD, "data.sources.7.path=x") == [
        "--set data.sources.7.path=x: data.sources[7]: does not exist in the file"
    ]


def train_keys() -> list[str]:
    return [
        k.removeprefix("train.")
        for k in all_keys(Recipe)
        if k.startswith("train.") and k.count(".") == 1
    ]
