"""vLLM 0.26.0 and SGLang 0.5.17 on a GPU are given the fixtures of preflight, and adapters made by PEFT there.

Run on a GPU host with ``python3 -m pytest -m gpu -s tests/gpu/test_preflight_agrees_on_gpu.py``. Folders to put first
on the engines' path: ``TOOLKIT_GPU_VLLM_SITE`` and ``TOOLKIT_GPU_SGLANG_SITE``; ``TOOLKIT_GPU_PYTHON`` is the
interpreter (python3), which needs torch, transformers and peft for the adapters.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.agreement import HERE, ask, base_folder, disagreements, job, surprises
from tests.preflight_cases import adapter_cases
from toolkit.engines.server import VLLM_CPU_PLUGIN

VLLM = "vllm 0.26.0"

GPU = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
PYTHON = os.environ.get("TOOLKIT_GPU_PYTHON", "python3")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU, reason="no NVIDIA GPU on this machine (no nvidia-smi, no /dev/nvidia0)"
    ),
]

VLLM_OPTIONS = {
    "dtype": "bfloat16",
    "max_model_len": 64,
    "max_num_seqs": 2,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 256 * 2**20,
}
SGLANG_OPTIONS = {
    "dtype": "bfloat16",
    "context_length": 64,
    "skip_tokenizer_init": True,
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "mem_fraction_static": 0.2,
    "max_running_requests": 4,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "log_level": "error",
}


def site(variable: str) -> str:
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} names no folder with the engine")
    return found


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Path]:
    """Adapters that PEFT wrote, by the name of their kind."""
    folder = tmp_path_factory.mktemp("peft")
    base = base_folder(folder / "base")
    command = [PYTHON, str(HERE / "make_peft.py"), str(base), str(folder / "made")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        print("PEFT made no adapters here:", done.stderr[-2000:])
        return {}
    return {f"peft {one.name}": one for one in sorted((folder / "made").iterdir())}


@pytest.mark.timeout(400)
def test_vllm_on_a_gpu_does_what_preflight_says(tmp_path, made):
    env = {
        "PYTHONPATH": site("TOOLKIT_GPU_VLLM_SITE"),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    file = job(tmp_path, "vllm 0.26.0", VLLM_OPTIONS, made)
    answers = ask([PYTHON], "ask_vllm.py", file, env, 380)
    found = list(surprises("vllm 0.26.0", answers))
    found += disagreements("vllm 0.26.0", tmp_path / "base", made, answers)
    print({name: answers["adapters"][name] for name in made})
    assert found == []


@pytest.mark.timeout(500)
def test_an_adapter_on_packed_weights_is_the_adapter_on_what_they_stand_for(tmp_path):
    """compressed-tensors, GPTQ and AWQ hold the same numbers; bitsandbytes rounds them again, and the adapter acts."""
    env = {"PYTHONPATH": site("TOOLKIT_GPU_VLLM_SITE"), "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    file = job(tmp_path, "vllm 0.26.0", VLLM_OPTIONS)
    asked = json.loads(file.read_text())
    served = next(c for c in adapter_cases((VLLM,)) if c.real.get(VLLM) == "changes")
    more = {
        "on_packed": asked["adapters"][served.name],
        "plugin": str(VLLM_CPU_PLUGIN),
        "bnb": True,
    }
    file.write_text(json.dumps(asked | more | {"adapters": {}, "bases": {}}))
    seen = ask([PYTHON], "ask_vllm.py", file, env, 480)["on_packed"]
    print(seen)
    plain = seen["unpacked"]["change"]
    for name in ("tensors", "gptq", "awq"):
        assert "why" not in seen[name], seen[name]
        assert seen[name]["base"] < 0.05  # another kernel, in bf16
        assert seen[name]["adapter"] < 0.05
        assert abs(seen[name]["change"] - plain) < 0.1
    if "bitsandbytes" in seen["bnb"].get("why", ""):
        pytest.skip(f"no bitsandbytes here: {seen['bnb']['why']}")
    assert seen["bnb"]["change"] > plain / 2, seen["bnb"]


@pytest.mark.timeout(400)
def test_sglang_on_a_gpu_does_what_preflight_says(tmp_path, made):
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    env = {
        "PYTHONPATH": site("TOOLKIT_GPU_SGLANG_SITE"),
        "CUDA_HOME": cuda,
        "PATH": f"{cuda}/bin:{os.environ['PATH']}",
    }
    # What preflight says would end the engine is not given to it: one process is asked everything.
    safe = {name: path for name, path in made.items() if name not in DEADLY}
    file = job(tmp_path, "sglang 0.5.17", SGLANG_OPTIONS, safe)
    answers = ask([PYTHON], "ask_sglang.py", file, env, 380)
    found = list(surprises("sglang 0.5.17", answers))
    found += disagreements("sglang 0.5.17", tmp_path / "base", safe, answers)
    print({name: answers["adapters"][name] for name in safe})
    assert found == []


DEADLY = ("peft rank-pattern", "peft lora-bias")
