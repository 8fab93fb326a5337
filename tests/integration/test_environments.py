"""The shipped CPU locks build and work: real packages, gigabytes, seconds from a warm uv cache."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit.environments import from_lock, load_lock, sync

pytestmark = pytest.mark.integration

LOOK = """
import json, torch
from importlib import metadata, util
print(json.dumps({
    "installed": {d.metadata["Name"]: d.version for d in metadata.distributions()},
    "torch": torch.__version__,
    "strays": [m for m in ("mlflow", "toolkit", "torchvision", "triton") if util.find_spec(m)],
}))
"""


def normal(versions):
    return {name.lower().replace("_", "-").replace(".", "-"): v for name, v in versions.items()}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return tmp_path / "environments"


@pytest.mark.parametrize("name", ["train-cpu", "quantize-cpu", "vllm-cpu"])
def test_a_shipped_lock_builds_into_exactly_what_it_says(name):
    """In the user's own cache: built once, by whoever comes first."""
    environment = from_lock(name)
    sync(environment)
    interpreter = environment.interpreter()
    done = subprocess.run(
        [interpreter.python, "-P", "-W", "ignore", "-c", LOOK],
        env=interpreter.environ(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert normal(found["installed"]) == normal(load_lock(name).pins)
    assert found["torch"].endswith("+cpu")
    assert found["strays"] == []


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
