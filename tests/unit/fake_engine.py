"""An engine whose program is ``tests/fake_vllm.py``: prints, takes its time, listens, hangs, dies."""

from pathlib import Path

from toolkit.engines import Command
from toolkit.engines.failures import COMMON, VLLM, first_match
from toolkit.engines.vllm import Vllm

PROGRAM = Path(__file__).parents[1] / "fake_vllm.py"


class FakeEngine:
    name = "fake"
    phases = (("configuring", "non-default args"), ("loading weights", "Starting to load model"))

    def command(self, python: Path, deployment, port: int) -> Command:
        adapters = [f"{adapter.name}={adapter.path}" for adapter in deployment.adapters]
        behaviour = deployment.serve.extra_args[:1] or ("serves",)
        options = ["--behaviour", *behaviour, *deployment.serve.extra_args[1:]]
        options += [] if deployment.lora else ["--no-lora"]
        argv = (
            str(python),
            str(PROGRAM),
            str(port),
            deployment.base_name,
            *adapters,
            *options,
        )
        return Command(argv, {"GONE": None})

    def model_id(self, deployment, adapter):
        return adapter or deployment.base_name

    def load_adapter(self, name, path):
        return Vllm().load_adapter(name, path)

    def unload_adapter(self, name):
        return Vllm().unload_adapter(name)

    def caches(self, folder: Path):
        return {"FAKE_CACHE": str(folder)}

    def explain(self, log: str):
        return first_match(log, (*VLLM, *COMMON))
