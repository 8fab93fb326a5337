"""``toolkit serve`` on a GPU host with the real engines: supervisor, front, proofs, swaps, a full GPU, a killed engine.

Run there with ``python3 -m pytest -m gpu tests/gpu/test_serving_on_gpu.py -k vllm``; some four minutes an engine once
the demo's adapter is trained (``TOOLKIT_GPU_WORKSPACE`` keeps it). See ``host.py`` for the variables.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu.host import (
    answer,
    chat,
    get,
    marks,
    memory_mib,
    on_recipe,
    project_folder,
    run,
    wait_for,
)
from toolkit.engines import guard

pytestmark = marks

QUESTION = "Hi! My hammock tore on the first day, order 48213. Please call me right away."
SGLANG = (
    "--set",
    "serve.extra_args=['--attention-backend','triton','--sampling-backend','pytorch']",
)
ENGINES = {"vllm": (), "sglang": SGLANG}
LEFT_MIB = 600
"""What may be in use more than before: the driver keeps a little for a while."""
HOLD = """
import sys, torch
kept = torch.empty(int(sys.argv[1]) * 2**20, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    return project_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def adapter(project) -> Path:
    """Folder of the demo's exported adapter, trained here if it is not there yet."""
    outcome = answer(on_recipe(project, "export"), project)
    return Path({s["name"]: s for s in outcome["steps"]}["export-adapter"]["artifact"])


@contextlib.contextmanager
def serving(project: Path, engine: str, *arguments: str) -> Iterator[dict]:
    """A detached server with the trained adapter; stopped at the end, and its memory free again."""
    before, _ = memory_mib()
    start = (
        "--detach",
        "--model",
        "tuned",
        "--set",
        f"serve.engine={engine}",
        "--set",
        "serve.port=0",
    )
    started = on_recipe(project, "serve", *start, *ENGINES[engine], *arguments)
    record = answer(started, project)
    try:
        yield record | {"said": started.stderr}
    finally:
        stopped = run("serve", "--stop", record["name"], "--workspace", str(project / "runs"))
    assert stopped.returncode == 0, stopped.stderr
    wait_for(lambda: memory_mib()[0] <= before + LEFT_MIB, 30)
    assert get(f"{record['url']}/healthz")[0] == 0


@contextlib.contextmanager
def gpu_held(mib: int) -> Iterator[None]:
    """Another process that holds ``mib`` of GPU memory."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(mib)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline().strip() == "held"
        yield
    finally:
        holder.communicate(timeout=60)


def status(project: Path, name: str) -> dict:
    done = run("serve", "--status", "--json", "--workspace", str(project / "runs"))
    return next(s["status"] for s in json.loads(done.stdout) if s["name"] == name)


def replica(project: Path, name: str) -> dict:
    return next(p for p in status(project, name)["parts"] if p["name"] == "replica-0")


def copied(adapter: Path, folder: Path, note: str) -> Path:
    """The same weights under another digest: a new version that has to pass the same proofs."""
    shutil.copytree(adapter, folder)
    (folder / "NOTE.txt").write_text(note)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_proven_served_swapped_killed_and_gone(project, adapter, engine, tmp_path):
    """One start for all of it: a start is most of the time."""
    with serving(project, engine) as record:
        url, name = record["url"], record["name"]
        assert get(f"{url}/readyz")[0] == 200
        certificate = json.loads(get(f"{url}/toolkit/certificate")[1])
        assert len(certificate["proofs"]) == 1
        assert engine in json.dumps(certificate["subject"])

        ticket = json.loads(chat(url, "tickets", QUESTION))
        assert ticket["order"] == "48213"
        assert chat(url, "tickets-base", QUESTION) != chat(url, "tickets", QUESTION)
        assert get(f"{url}/tokenize")[0] == 404

        swapped_under_load(project, url, copied(adapter, tmp_path / "v2", engine))
        killed_and_healed(project, url, name)
        assert json.loads(chat(url, "tickets", QUESTION)) == ticket


def swapped_under_load(project: Path, url: str, version: Path) -> None:
    """No request fails while a new version is loaded, proven, routed to, and the old one unloaded."""
    stop, failures, answered = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                answered.append(chat(url, "tickets", QUESTION))
            except OSError as error:
                failures.append(repr(error))

    before = [m["id"] for m in json.loads(get(f"{url}/v1/models")[1])["data"]]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(ask)
        try:
            done = run("adapters", "swap", "tickets", version, "--workspace", project / "runs")
        finally:
            stop.set()
    assert done.returncode == 0, done.stderr
    assert not failures
    assert len(answered) >= 8  # a swap can be over before the first answers are
    assert [m["id"] for m in json.loads(get(f"{url}/v1/models")[1])["data"]] == before


def killed_and_healed(project: Path, url: str, name: str) -> None:
    """kill -9 of the engine: the front says so at once and the supervisor starts it again."""
    part = replica(project, name)
    engine = min(guard.descendants(part["pid"]))
    os.kill(engine, signal.SIGKILL)
    wait_for(lambda: get(f"{url}/readyz")[0] == 503, 10, every_s=0.1)
    wait_for(lambda: get(f"{url}/readyz")[0] == 200, 300)
    after = replica(project, name)
    assert after["restarts"] == part["restarts"] + 1
    assert after["pid"] != part["pid"]


def test_a_gpu_that_is_ninety_percent_full_gets_a_smaller_engine(project, adapter):
    used, total = memory_mib()
    with gpu_held(int(total * 0.9) - used), serving(project, "vllm") as record:
        assert json.loads(chat(record["url"], "tickets", QUESTION))["order"] == "48213"
        shrunk = r"GPU 0 has .* GiB free .*: serve\.memory_fraction 0\.9 becomes 0\.0\d"
        assert re.search(shrunk, record["said"]), record["said"]


def test_a_full_gpu_is_refused_with_the_numbers(project, adapter):
    used, total = memory_mib()
    with gpu_held(total - used - 1700):  # a context of half a GiB comes on top
        done = on_recipe(project, "serve", "--detach", "--model", "tuned", "--set", "serve.port=0")
    assert done.returncode == 1
    assert re.search(r"GPU 0 has 0\.\d of \d+\.\d GiB free", done.stderr), done.stderr
    assert "nvidia-smi" in done.stderr
