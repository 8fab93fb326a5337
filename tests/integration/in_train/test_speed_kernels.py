"""The Triton kernels of the fast path against float64, in Triton's interpreter: no GPU, no compiler.

``tests/gpu/test_train_speed_on_gpu.py`` tests them compiled. PyTorch brings Triton with its CUDA build only, so ``make
integration`` puts it into a folder of its own: 0.7 GB that training on a CPU has no use for.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
PROGRAM = Path(__file__).with_name("speed_kernels_program.py")
ROOT = Path(__file__).parents[3]
TRITON = ROOT / ".venv" / "triton"


@pytest.mark.skipif(
    not TRITON.is_dir() and find_spec("triton") is None, reason=f"Triton is not in {TRITON}"
)
def test_kernels_compute_what_float64_does():
    own = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TRITON}"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env=os.environ | own, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 10
    far = {(name, what): e for name, all_ in found.items() for what, e in all_.items() if e > 1e-6}
    assert not far
