"""The shipped CPU locks build and work: real packages, gigabytes, seconds from a warm uv cache."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit.environments import from_lock, sync

pytestmark = pytest.mark.integration

IMPORTS = {
    "train-cpu": "import torch, transformers, peft, trl, datasets, bitsandbytes, matplotlib",
    "quantize-cpu": "import torch, llmcompressor, compressed_tensors, peft, matplotlib",
    "vllm-cpu": "import torch, vllm.entrypoints.openai.api_server",
}
SHOW = "\nimport json\nprint(json.dumps([torch.__version__, torch.cuda.is_available()]))"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return tmp_path / "environments"


@pytest.mark.parametrize("name", IMPORTS)
def test_a_shipped_lock_builds_and_its_packages_import(name):
    """In the user's own cache: built once, by whoever comes first."""
    environment = from_lock(name)
    sync(environment)
    interpreter = environment.interpreter()
    done = subprocess.run(
        [interpreter.python, "-W", "ignore", "-c", IMPORTS[name] + SHOW],
        env=interpreter.environ(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version, cuda = json.loads(done.stdout.splitlines()[-1])
    assert version.endswith("+cpu")
    assert cuda is False


def test_kill_9_in_the_middle_leaves_no_environment_and_sync_goes_on(cache):
    command = [sys.executable, "-m", "toolkit", "env", "sync", "train-cpu"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(cache.glob("*.part/lib/python*/site-packages/*.dist-info")):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not from_lock("train-cpu").is_ready
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert from_lock("train-cpu").is_ready
    assert list(cache.glob("*.part")) == []
