"""A real vLLM on the CPU is given the adapters and quantized bases of the fixtures: preflight said what it does."""

import pytest

from tests.agreement import ask, job, surprises
from tests.preflight_cases import adapter_cases, recipe_cases

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


@pytest.mark.timeout(900)
def test_vllm_does_what_preflight_says(tmp_path):
    from toolkit.environments import resolve

    interpreter = resolve("vllm", accelerator="cpu").interpreter()
    file = job(tmp_path, ENGINE, OPTIONS)
    env = {**interpreter.environ(), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    answers = ask([str(interpreter.python)], "ask_vllm.py", file, env, 850)
    assert answers["version"].startswith("0.32.0")
    assert list(surprises(ENGINE, answers)) == []


def test_most_fixtures_are_given_to_it():
    assert sum(ENGINE in case.real for case in adapter_cases((ENGINE,))) >= 55
    assert sum(ENGINE in case.real for case in recipe_cases()) >= 20
