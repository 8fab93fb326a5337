"""What the GPU tests share: the demo recipe in a workspace, and ``toolkit`` run on it through the host's profile.

``TOOLKIT_GPU_MODEL`` names the GGUF file when the host has no package index, ``TOOLKIT_GPU_WORKSPACE`` keeps the
workspace, ``TOOLKIT_GPU_PROFILE`` is another profile than ``gpu-host``. ``TOOLKIT_GPU_DRY=1`` lets the tests that know
it run without a GPU, at a size for that.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

GPU = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
SOURCE = os.environ.get("TOOLKIT_GPU_MODEL")
PROFILE = os.environ.get("TOOLKIT_GPU_PROFILE", "gpu-host")
DRY = os.environ.get("TOOLKIT_GPU_DRY") == "1"

marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU, reason="no NVIDIA GPU on this machine (no nvidia-smi, no /dev/nvidia0)"
    ),
]


def project_folder(tmp_path_factory) -> Path:
    given = os.environ.get("TOOLKIT_GPU_WORKSPACE")
    folder = Path(given) if given else tmp_path_factory.mktemp("project")
    if not (folder / "tickets.yaml").exists():
        start = [sys.executable, "-m", "toolkit", "init", str(folder / "tickets.yaml")]
        subprocess.run(start, check=True, capture_output=True)
    return folder


def run(
    *arguments: str, timeout_s: int = 1500, one_gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """``toolkit ARGUMENTS``, whatever its exit code; with ``one_gpu`` on the first visible one alone."""
    command = [sys.executable, "-m", "toolkit", *map(str, arguments)]
    own = {"CUDA_VISIBLE_DEVICES": first_gpu()} if one_gpu else {}
    return subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, timeout=timeout_s, check=False
    )  # fmt: skip


def first_gpu() -> str:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def on_recipe(project: Path, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command on the demo recipe; eager, because speed is not judged here and compiling takes most of a start."""
    source = ("--set", f"model.source={SOURCE}", "--set", "model.sha256=null") if SOURCE else ()
    return run(
        verb, project / "tickets.yaml", "--json", *source, "--set", "serve.eager=true",
        "--profile", PROFILE, "--workspace", project / "runs", *arguments,
    )  # fmt: skip


def answer(done: subprocess.CompletedProcess[str], project: Path) -> dict:
    """The JSON of a command that went well."""
    assert done.returncode == 0, f"{done.stderr[-6000:]}\n{logs(project)}"
    return json.loads(done.stdout)


def logs(project: Path) -> str:
    """The end of the newest log."""
    runs = project / "runs"
    found = [*runs.glob("state/*/*/log.txt"), *runs.rglob("*.log")]
    found.sort(key=lambda path: path.stat().st_mtime)
    return f"{found[-1]}:\n{found[-1].read_text()[-6000:]}" if found else "nothing wrote a log"


def get(url: str, timeout_s: float = 5) -> tuple[int, str]:
    """Status and body; 0 when nothing listens."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def chat(url: str, model: str, text: str, timeout_s: float = 60) -> str:
    """One greedy answer."""
    body = {
        "model": model, "max_tokens": 32, "temperature": 0,
        "messages": [{"role": "system", "content": "Write the support ticket as JSON."},
                     {"role": "user", "content": text}],
    }  # fmt: skip
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=timeout_s) as reply:
        return json.loads(reply.read())["choices"][0]["message"]["content"]


def wait_for(what, timeout_s: float, every_s: float = 0.5):
    """The first true value of ``what()``."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(every_s)
    pytest.fail(f"not within {timeout_s} s")


def memory_mib() -> tuple[int, int]:
    """(used, total) of the first GPU that CUDA_VISIBLE_DEVICES leaves."""
    query = [
        "nvidia-smi",
        "-i",
        first_gpu(),
        "--query-gpu=memory.used,memory.total",
        "--format=csv,noheader,nounits",
    ]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    used, total = said.splitlines()[0].split(",")
    return int(used), int(total)
