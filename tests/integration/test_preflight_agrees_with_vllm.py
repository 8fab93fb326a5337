"""A real vLLM on the CPU is given the adapters and quantized bases of the fixtures: preflight said what it does."""

import json

import pytest

from tests.agreement import ask, job, surprises
from tests.preflight_cases import adapter_cases, recipe_cases
from toolkit.engines.server import VLLM_CPU_PLUGIN

pytestmark = pytest.mark.integration

ENGINE = "vllm 0.32.0"

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 2,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 * 2**20,
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    from toolkit.environments import resolve

    folder = tmp_path_factory.mktemp("asked")
    interpreter = resolve("vllm", accelerator="cpu").interpreter()
    file = job(folder, ENGINE, OPTIONS)
    served = next(c for c in adapter_cases((ENGINE,)) if c.real.get(ENGINE) == "changes")
    adapter = str(folder / "adapters" / served.name / "a")
    more = {"on_packed": adapter, "plugin": str(VLLM_CPU_PLUGIN)}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    env = {**interpreter.environ(), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return ask([str(interpreter.python)], "ask_vllm.py", file, env, 850)


@pytest.mark.timeout(900)
def test_vllm_does_what_preflight_says(answers):
    assert answers["version"].startswith("0.32.0")
    assert list(surprises(ENGINE, answers)) == []


@pytest.mark.parametrize("format_", ["tensors", "gptq", "awq"])
def test_an_adapter_on_4_bit_weights_is_the_adapter_on_what_they_stand_for(answers, format_):
    """As compressed-tensors, AutoGPTQ and AutoAWQ write them."""
    seen = answers["on_packed"][format_]
    assert "why" not in seen, seen
    assert seen["change"] > 0.01
    assert seen["base"] < 1e-3
    assert seen["adapter"] < 1e-3


def test_most_fixtures_are_given_to_it():
    assert sum(ENGINE in case.real for case in adapter_cases((ENGINE,))) >= 55
    assert sum(ENGINE in case.real for case in recipe_cases()) >= 20
