"""How each server is started: the toolkit's own command for an engine, the bare engine, the front before either."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.engines import ENGINES, Command, Deployment
from toolkit.recipe.serve import ServeSection

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BASE = "bench"
CONTEXT = 4096
CONCURRENT = 256
"""``serve.max_concurrent`` of the toolkit's servers: as many clients as the largest load has."""
SGLANG_KIT = ("--attention-backend", "triton", "--sampling-backend", "pytorch")
"""For an SGLang without its FlashAttention 3 and FlashInfer libraries; given to the bare one too."""


@dataclass(frozen=True)
class Variant:
    """Changes to the toolkit's command that may make adapters cheaper."""

    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """A server to start: its command, and what a request writes as ``model``."""

    argv: tuple[str, ...]
    env: dict[str, str]
    base: str
    adapters: tuple[str, ...] = ()

    def shown(self) -> str:
        """As a line for a shell."""
        import shlex

        variables = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        return " ".join([*variables, *map(shlex.quote, self.argv)])


@dataclass(frozen=True)
class Host:
    """Where things are on the machine."""

    models: Path
    sites: dict[str, Path | None]
    """Folders of packages for ``vllm``, ``sglang`` and ``front``."""
    cache: Path
    fake: bool = False

    def variables(self, engine: str) -> dict[str, str]:
        """What an engine needs in its environment on such a host, ours and the bare one alike."""
        site, folder = self.sites.get(engine), self.cache / engine
        env = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "CUDA_HOME": os.environ.get("CUDA_HOME", "/usr/local/cuda"),
        }
        # Where the toolkit keeps what an engine compiles, so that "cold" and "warm" mean something.
        env |= ENGINES[engine]().caches(folder)
        return env | ({"PYTHONPATH": str(site)} if site else {})


def ours(
    host: Host, engine: str, model: str, port: int, *, adapters: int, variant: Variant
) -> Launch:
    """The command of ``toolkit.engines``, as ``toolkit serve`` would start it."""
    kit = SGLANG_KIT if engine == "sglang" else ()
    # A share of 0.85 leaves SGLang's graphs their memory; the KV cache of these loads needs a quarter of it.
    serve = ServeSection(
        engine=engine,
        max_concurrent=CONCURRENT,
        memory_fraction=0.85 if engine == "sglang" else 0.9,
        extra_args=(*kit, *variant.args),
    )
    folders = {f"a{number}": host.models / f"a{number}" for number in range(adapters)}
    deployment = Deployment.read(
        host.models / model, folders, serve, name=BASE, max_length=CONTEXT, device="cuda"
    )
    kind = ENGINES[engine]()
    command = kind.command(Path(sys.executable), deployment, port)
    names = tuple(kind.model_id(deployment, name) for name in folders)
    env = {key: value.format(cache=host.cache) for key, value in variant.env.items()}
    env = _environ(host, engine, command) | env
    launch = Launch(command.argv, env, deployment.base_name, names)
    return _fake(launch, engine, port, list(folders)) if host.fake else launch


def bare(host: Host, engine: str, model: str, port: int) -> Launch:
    """The engine with its default flags and no adapters."""
    folder = str(host.models / model)
    common = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", BASE)
    argv = {
        "vllm": ("-m", "vllm.entrypoints.cli.main", "serve", folder, *common),
        "sglang": ("-m", "sglang.launch_server", "--model-path", folder, *common, *SGLANG_KIT),
    }[engine]
    launch = Launch((sys.executable, *argv), host.variables(engine), BASE)
    return _fake(launch, engine, port, []) if host.fake else launch


def front(host: Host, engine: str, settings: Path) -> Launch:
    """``python -m toolkit.gateway`` before whatever its table says."""
    folders = [REPOSITORY, host.sites.get("front"), host.sites.get(engine)]
    path = os.pathsep.join(str(folder) for folder in folders if folder)
    argv = (sys.executable, "-m", "toolkit.gateway", str(settings))
    return Launch(argv, {"PYTHONPATH": path}, BASE)


def front_settings(folder: Path, port: int, control: Path) -> Path:
    """The front's settings with everything that costs time switched as a recipe leaves it."""
    file = folder / "front.json"
    values = {
        "name": BASE,
        "port": port,
        "control": str(control),
        "access_log": str(folder / "front-access.jsonl"),
        "state_file": str(folder / "front-state.json"),
    }
    file.write_text(json.dumps(values))
    return file


def _environ(host: Host, engine: str, command: Command) -> dict[str, str]:
    """The toolkit's variables; those of the host win, as a profile's would."""
    given = {key: value for key, value in command.env.items() if value is not None}
    return {**command.defaults} | given | host.variables(engine)


def _fake(launch: Launch, engine: str, port: int, adapters: list[str]) -> Launch:
    argv = (sys.executable, str(HERE / "fake.py"), str(port), engine, launch.base, *adapters)
    return Launch(argv, {}, launch.base, launch.adapters)
