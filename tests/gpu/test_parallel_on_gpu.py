"""Two GPUs train as one does: the same loss curve, in half the time.

Run there with ``python3 -m pytest -m gpu -s tests/gpu/test_parallel_on_gpu.py``; about 100 seconds. It needs torch,
transformers, peft and pydantic; the ZeRO cases are left out without deepspeed. ``TOOLKIT_GPU_OUT`` names a file that
takes one line of JSON per case as soon as it is known.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

PROGRAM = Path(__file__).parent / "ranks_on_gpu.py"
SCALING = 0.96
"""Goal of two GPUs against one: share of twice its tokens per second."""


def gpus() -> int:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return (
            len(
                subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
            )
            - 1
        )
    except (OSError, subprocess.CalledProcessError):
        return 0


if gpus() < 2:
    pytest.skip("needs two NVIDIA GPUs", allow_module_level=True)


def train(ranks: int, *cases: str, out: Path) -> dict[str, dict]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), str(PROGRAM), str(out), *cases]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert ran.returncode == 0, ran.stderr[-6000:]
    return {one["case"]: one for one in found}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    out = Path(os.environ.get("TOOLKIT_GPU_OUT") or tmp_path_factory.mktemp("ranks") / "runs.jsonl")
    zero = ("zero2", "zero3") if find_spec("deepspeed") else ()
    one = train(1, "single", out=out)
    return one | train(2, "ddp", "fsdp", *zero, out=out)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_curve_is_that_of_one_gpu(runs, engine):
    if engine not in runs:
        pytest.skip("deepspeed is not installed")
    assert (runs[engine]["engine"], runs[engine]["ranks"]) == (engine, 2)
    assert runs[engine]["loss"] == pytest.approx(runs["single"]["loss"], rel=0.01)
    assert runs[engine]["heldout_loss"] == pytest.approx(runs["single"]["heldout_loss"], rel=0.01)


def test_two_gpus_are_almost_twice_as_fast_as_one(runs):
    alone = runs["single"]["tokens_per_second"]
    shares = {
        name: run["tokens_per_second"] / (2 * alone)
        for name, run in runs.items()
        if name != "single"
    }
    for name, run in runs.items():
        share = f"{shares[name]:.1%} of twice one" if name in shares else ""
        print(f"{name:8} {run['tokens_per_second']:9.0f} tok/s {run['peak_gib']:6.1f} GiB  {share}")
    assert max(shares.values()) >= SCALING, shares
