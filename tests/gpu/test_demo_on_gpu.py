"""The demo recipe on a GPU host, through a profile that maps environments to the host's interpreter.

Run there with ``python3 -m pytest -m gpu tests/gpu``. ``TOOLKIT_GPU_MODEL`` names the GGUF file when the host has no
package index; ``TOOLKIT_GPU_WORKSPACE`` keeps the workspace.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GPU = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU, reason="no NVIDIA GPU on this machine (no nvidia-smi, no /dev/nvidia0)"
    ),
]

SOURCE = os.environ.get("TOOLKIT_GPU_MODEL")


def toolkit(project: Path, verb: str, *arguments: str) -> dict:
    """Run a command on the copied demo recipe; its JSON."""
    source = ("--set", f"model.source={SOURCE}", "--set", "model.sha256=null") if SOURCE else ()
    command = [sys.executable, "-m", "toolkit", verb, str(project / "tickets.yaml"), "--json"]
    # Eager, because an engine's speed is not judged here and compiling takes most of its start.
    command += [
        *source,
        "--set",
        "serve.eager=true",
        "--profile",
        "gpu-host",
        "--workspace",
        str(project / "runs"),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, f"{done.stderr[-6000:]}\n{logs(project)}"
    return json.loads(done.stdout)


def logs(project: Path) -> str:
    """The end of the newest step's log."""
    found = sorted((project / "runs").glob("state/*/*/log.txt"), key=lambda p: p.stat().st_mtime)
    return f"{found[-1]}:\n{found[-1].read_text()[-6000:]}" if found else "no step wrote a log"


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    given = os.environ.get("TOOLKIT_GPU_WORKSPACE")
    folder = Path(given) if given else tmp_path_factory.mktemp("project")
    if not (folder / "tickets.yaml").exists():
        start = [sys.executable, "-m", "toolkit", "init", str(folder / "tickets.yaml")]
        subprocess.run(start, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def finished(project) -> dict[str, dict]:
    """The demo with its real gates, served by vLLM; steps by name."""
    outcome = toolkit(project, "run")
    assert all(gate["passed"] for gate in outcome["gates"])
    return {s["name"]: s for s in outcome["steps"]}


def test_the_demo_reaches_its_goals(finished):
    scores = {
        s: finished[f"evaluate-{s}"]["metrics"]["json_match"] for s in ("base", "tuned", "gptq")
    }
    print({name: step["seconds"] for name, step in finished.items()}, scores)
    assert scores["base"] < 0.05
    assert scores["tuned"] >= 0.8
    assert scores["gptq"] >= scores["tuned"] - 0.03


def test_training_ran_on_the_gpu(finished):
    facts = json.loads((Path(finished["train"]["artifact"]) / "manifest.json").read_text())["facts"]
    assert facts["trained_on"] == "bf16"


@pytest.mark.parametrize("subject", ["tuned", "gptq"])
def test_vllm_answers_with_each_model(finished, subject):
    folder = Path(finished[f"serve-{subject}"]["artifact"])
    answers = json.loads((folder / "answers.json").read_text())
    assert answers
    assert all(a["answer"].strip() for a in answers)


def test_sglang_serves_the_base_with_the_adapter(project, finished):
    outcome = toolkit(
        project, "run", "--set", "serve.engine=sglang", "--set", "serve.models=[tuned]",
        "--set", "serve.extra_args=['--attention-backend','triton','--sampling-backend','pytorch']",
    )  # fmt: skip
    served = {s["name"]: s for s in outcome["steps"]}["serve-tuned"]
    answers = json.loads((Path(served["artifact"]) / "answers.json").read_text())
    assert all(a["answer"].strip() for a in answers)
