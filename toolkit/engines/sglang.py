"""SGLang: ``python -m sglang.launch_server``, 0.5.17 and newer; on a CPU it needs kernels that few have."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from toolkit.engines import LOOPBACK, Call, Command, Deployment
from toolkit.engines.failures import COMMON, SGLANG, first_match
from toolkit.engines.options import arguments
from toolkit.environments.compiled import variables

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

CPU_TOKENS = 8192
"""KV cache on a CPU, tokens: SGLang cannot be told in bytes."""


class Sglang:
    """See :class:`toolkit.engines.Engine`."""

    name: ClassVar[str] = "sglang"
    phases: ClassVar[tuple[tuple[str, str], ...]] = (
        ("configuring", "server_args="),
        ("starting engine", "Init torch distributed begin"),
        ("loading weights", "Load weight begin"),
        ("allocating KV cache", "KV Cache is allocated"),
        ("capturing graphs", "CUDA graph begin"),
        ("warming up", "Uvicorn running on"),
    )

    def command(self, python: Path, deployment: Deployment, port: int) -> Command:
        """The argument list; a quantized checkpoint names its own method, but bitsandbytes needs its own loader."""
        serve = deployment.serve
        argv = [
            *(str(python), "-m", "sglang.launch_server"),
            *("--model-path", str(deployment.model)),
            *("--host", LOOPBACK, "--port", str(port)),
            *("--served-model-name", deployment.base_name),
            *("--context-length", str(deployment.max_length)),
            *("--dtype", DTYPES[serve.dtype]),
            *("--max-running-requests", str(serve.max_concurrent)),
        ]
        if deployment.chat_template:
            argv += ["--chat-template", str(deployment.chat_template)]
        if deployment.trust_remote_code:
            argv += ["--trust-remote-code"]
        if deployment.quantization == "bitsandbytes":
            argv += ["--load-format", "bitsandbytes"]
        argv += arguments(self.name, serve, deployment.draft)
        argv += _device(deployment)
        argv += _adapters(deployment)
        return Command((*argv, *serve.extra_args), _variables(deployment), _defaults(deployment))

    def model_id(self, deployment: Deployment, adapter: str | None) -> str:
        """An adapter is asked for as ``base:adapter``."""
        return f"{deployment.base_name}:{adapter}" if adapter else deployment.base_name

    def load_adapter(self, name: str, path: Path) -> Call:
        """Answers 400 with ``error_message`` when it refuses, and with data parallelism always."""
        return Call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def unload_adapter(self, name: str) -> Call:
        """Answers only when the last open request of the adapter is done, and 400 for a name it does not know."""
        return Call("POST", "/unload_lora_adapter", {"lora_name": name})

    def caches(self, folder: Path) -> dict[str, str]:
        """0.5.23 derives most from its own folder, 0.5.17 only a few."""
        own = {
            "SGLANG_CACHE_DIR": str(folder / "sglang"),
            "SGLANG_DG_CACHE_DIR": str(folder / "deep_gemm"),
            "SGLANG_JIT_CACHE_DIR": str(folder / "sglang" / "jit"),
        }
        return variables(folder) | own

    def explain(self, log: str) -> str | None:
        """Known causes, SGLang's own first."""
        return first_match(log, (*SGLANG, *COMMON))


def _device(deployment: Deployment) -> list[str]:
    if deployment.device == "cpu":
        lora = ["--lora-backend", "torch_native"] if deployment.lora else []
        return [
            *(
                "--device",
                "cpu",
                "--attention-backend",
                "torch_native",
                "--disable-overlap-schedule",
            ),
            *("--max-total-tokens", str(CPU_TOKENS), *lora),
        ]
    eager = ["--disable-cuda-graph"] if deployment.eager else []
    return ["--mem-fraction-static", str(deployment.serve.memory_fraction), *eager]


def _adapters(deployment: Deployment) -> list[str]:
    """The flags of adapters.

    Without ``--max-loaded-loras``: beyond it SGLang unloads adapters by itself, the least used first. Without
    ``--lora-strict-loading``: it looks when the first request comes, and then ends the whole engine.
    """
    if not deployment.lora:
        return []
    argv = [
        *("--enable-lora", "--max-lora-rank", str(deployment.max_rank)),
        *("--lora-target-modules", *(deployment.targets or ("all",))),
        # A request for the bare base takes a place in the batch too.
        *("--max-loras-per-batch", str(deployment.slots + 1)),
    ]
    if deployment.adapters:
        argv += ["--lora-paths", *(f"{a.name}={a.path}" for a in deployment.adapters)]
    return argv


def _variables(deployment: Deployment) -> dict[str, str | None]:
    env: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": None,  # modules would be compiled anew in every start
    }
    return env | {"SGLANG_USE_CPU_ENGINE": "1"} if deployment.device == "cpu" else env


def _defaults(deployment: Deployment) -> dict[str, str]:
    """What it compiles at a first start is compiled on all cores: Marlin, for 4-bit weights, is one file of minutes."""
    return {"NVCC_APPEND_FLAGS": "--split-compile=0"} if deployment.device == "cuda" else {}
