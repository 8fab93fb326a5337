"""Every shipped recipe loads, fits its schema, plans, and passes preflight where it is meant to run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.folders import LLAMA, adapter_folder, model_folder
from toolkit.forecast.parts import Fit, summed
from toolkit.observe import local_files
from toolkit.plan import Observed, make_plan
from toolkit.preflight import Outcome, check, gather
from toolkit.preflight.gpu import described
from toolkit.preflight.memory import forecasts
from toolkit.recipe import schema
from toolkit.recipe.load import load

ROOT = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(ROOT.rglob("*.yaml"))
IDS = [str(path.relative_to(ROOT)) for path in SHIPPED]
NEEDS_GPU = (
    "llama-3.1-70b-qlora.yaml",
    "llama-3.1-8b-fp8.yaml",
    "llama-3.1-8b-lora.yaml",
    "llama-3.1-8b-qlora.yaml",
    "llama-3.1-8b-dpo.yaml",
    "llama-3.1-8b-grpo.yaml",
    "qwen3-8b-lora.yaml",
    "sglang-two-adapters.yaml",
)
LLAMA_8B = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}

SIZES = {
    "llama-8b": LLAMA_8B | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-70b": LLAMA
    | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "qwen3-8b": LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "tie_word_embeddings": False,
    },
}  # fmt: skip
MEANT_FOR = {
    "llama-3.1-8b-lora.yaml": ("llama-8b", 40),
    "llama-3.1-8b-qlora.yaml": ("llama-8b", 10e9 / 2**30),
    "llama-3.1-8b-fp8.yaml": ("llama-8b", 24),
    "llama-3.1-70b-qlora.yaml": ("llama-70b", 80e9 / 2**30),
    "llama-3.1-8b-dpo.yaml": ("llama-8b", 40),
    "llama-3.1-8b-grpo.yaml": ("llama-8b", 80),
    "qwen3-8b-lora.yaml": ("qwen3-8b", 40),
}
"""Shape of the base, and GiB of the GPU that the first lines name."""

each = pytest.mark.parametrize("path", SHIPPED, ids=IDS)


@pytest.fixture
def somewhere(tmp_path):
    """A copy of the recipes with small folders where they expect models and adapters."""
    copy = tmp_path / "recipes"
    shutil.copytree(ROOT, copy)
    for folder in (copy / "quantize", copy / "serve"):
        model_folder(folder / "model")
    model_folder(copy / "demo" / "tickets-merged")
    for name in ("billing", "travel"):
        adapter_folder(copy / "serve" / "adapters" / name)
    return copy


def test_there_are_as_many_as_are_promised():
    assert len(SHIPPED) >= 7
    names = {str(name) for name in IDS}
    assert {f"quantize/{m}.yaml" for m in ("gptq", "awq", "bnb")} <= names
    assert {f"serve/{e}-two-adapters.yaml" for e in ("vllm", "sglang")} <= names


@each
def test_it_names_its_schema_on_the_first_line(path):
    first = path.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert named != first
    assert (path.parent / named).resolve() == ROOT / "recipe.schema.json"


@each
def test_it_fits_the_schema(path):
    # An editor's YAML reads 1e-4 as text (YAML 1.1), so numbers come from the loader the toolkit uses.
    recipe = load(path).recipe.model_dump(mode="json", exclude_unset=True)
    Draft202012Validator(schema.json_schema()).validate(recipe)


@each
def test_it_has_a_name_and_a_description(path):
    recipe = load(path).recipe
    assert recipe.description
    assert len(recipe.description) < 100


@each
def test_its_keys_are_explained(path):
    """At least a third of the lines that set a value carry a comment on the line or above it."""
    lines = path.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\s*(- )?[a-z_]+: \S", line)]
    explained = [i for i in keys if "#" in lines[i] or lines[i - 1].strip().startswith("#")]
    assert len(explained) >= len(keys) / 3, f"{len(explained)} of {len(keys)}"


@each
def test_it_plans_without_a_gpu(path, somewhere):
    loaded = load(somewhere / path.relative_to(ROOT))
    files = {text: "0" * 64 for text, _ in local_files(loaded.recipe)}
    plan = make_plan(loaded, Observed(files, {}))
    assert plan.steps[0].name == "fetch"
    stages = {step.stage for step in plan.steps}
    for section in ("train", "quantize", "evaluate", "serve"):
        assert bool(getattr(loaded.recipe, section)) == (section in stages)


@each
def test_preflight_refuses_nothing_where_it_is_meant_to_run(path, somewhere):
    loaded = load(somewhere / path.relative_to(ROOT))
    gpu = path.name in NEEDS_GPU
    facts = gather(
        loaded.recipe,
        loaded.directory,
        accelerator="cuda" if gpu else "cpu",
        base_config=LLAMA_8B if path.parent == ROOT else None,
    )
    refused = [str(v) for v in check(loaded.recipe, facts) if v.outcome is Outcome.refuse]
    assert refused == []


@pytest.mark.parametrize("name", MEANT_FOR)
def test_training_fits_the_gpu_that_the_recipe_names(name, somewhere):
    shape, memory_gib = MEANT_FOR[name]
    loaded = load(somewhere / name)
    facts = gather(
        loaded.recipe, loaded.directory, accelerator="cuda", base_config=SIZES[shape],
        gpu=described(memory_gib, 9.0, 1),
    )  # fmt: skip
    (step,) = [one for one in forecasts(loaded.recipe, facts) if one.step == "train"]
    assert step.fit is Fit.fits, summed(step.forecast.parts)


def test_every_recipe_for_a_gpu_that_trains_has_one_named():
    assert set(MEANT_FOR) == {path.name for path in SHIPPED if path.parent == ROOT}


@each
def test_it_runs_no_code_of_strangers_and_listens_on_loopback(path):
    recipe = load(path).recipe
    assert recipe.model.trust_remote_code is False
    assert recipe.serve is None or recipe.serve.host == "127.0.0.1"


def test_the_committed_schema_is_the_models():
    assert (ROOT / "recipe.schema.json").read_text() == schema.text(), "run: make docs"


def test_the_schema_is_a_valid_schema_and_strict_everywhere():
    found = schema.json_schema()
    Draft202012Validator.check_schema(found)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for part in (found, *found["$defs"].values()):
        assert part["additionalProperties"] is False


def test_every_key_of_the_schema_is_described():
    found = schema.json_schema()
    bare = [
        f"{name}.{key}"
        for name, part in [("recipe", found), *found["$defs"].items()]
        for key, field in part["properties"].items()
        if not field.get("description")
    ]
    assert bare == []


def test_examples_in_the_schema_are_valid():
    found = schema.json_schema()
    for key, examples in schema.EXAMPLES.items():
        part = schema.field_at(found, key)
        validator = Draft202012Validator(part | {"$defs": found["$defs"]})
        for example in examples:
            validator.validate(example)


def test_the_schema_finds_an_unknown_key():
    wrong = {"name": "x", "model": {"source": "./m"}, "train": {"lora": {"rnak": 8}}}
    (error,) = Draft202012Validator(schema.json_schema()).iter_errors(wrong)
    text = json.dumps([c.message for c in error.context]) + error.message
    assert "rnak" in text


def test_the_reference_names_every_key_once():
    text = schema.reference()
    for line in (
        "## `train.lora`",
        "## `quantize[].calibration`",
        "## `data.heldout.sources[]`\n\nAs `data.sources[]`.",
    ):
        assert text.count(line) == 1
    assert "| `rank` | integer, ≥ 1 | `16` |" in text
    assert "| `max_steps` | integer, ≥ 1 | - |" in text
    assert all(
        len(row.split(" | ")) == 4
        for row in text.splitlines()
        if row.startswith("| `") and "\\|" not in row
    )


def test_shipped_yaml_is_plain_yaml():
    for path in SHIPPED:
        assert isinstance(yaml.safe_load(path.read_text()), dict)
