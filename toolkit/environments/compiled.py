"""Where programs keep what they compile: one folder per environment, so that a second start finds it.

Compiled kernels fit the packages they were made with, so each lock has a folder of its own under the cache. It is the
user's alone (0700): what lies there is loaded as code. Processes share it as they come: PyTorch and Triton rename
finished files into place, and hold a lock file while a C++ compiler runs.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.environments.resolve import RECORD
from toolkit.workspace import cache_root, private_folder

if TYPE_CHECKING:
    from toolkit.stages import Interpreter

SHOWN = 16
"""Hex digits that name the folder of an interpreter that no lock made."""

TRIED_BYTES = 2**20
"""Written and forgotten before a folder is used: a compiler that finds the disk full ends what wanted to be faster."""


def folder(interpreter: Interpreter) -> Path | None:
    """The folder for what an environment's programs compile; made where it is new, absolute.

    ``None`` where it cannot be written: the disk is full, or the cache is read-only. Programs then compile where they
    would without us, in ``/tmp`` or the home folder.
    """
    try:
        path = private_folder(cache_root().absolute() / "compiled" / _key(interpreter))
        with tempfile.TemporaryFile(dir=path) as tried:
            tried.write(bytes(TRIED_BYTES))
            tried.flush()
    except OSError:
        return None
    return path


def _key(interpreter: Interpreter) -> str:
    """Name and digest of the lock; for a profile's interpreter a digest of where its packages lie."""
    built = interpreter.python.parent.parent
    if (built / RECORD).is_file():
        return built.name
    places = "\n".join(map(str, (interpreter.python, *interpreter.pythonpath)))
    return f"given-{hashlib.sha256(places.encode()).hexdigest()[:SHOWN]}"


def variables(root: Path) -> dict[str, str]:
    """What the libraries of stages and engines read, whichever they are; what the user set goes before them.

    vLLM moves Inductor's and Triton's caches below its own while it compiles; the variables are for kernels that are
    compiled outside of that, such as those of LoRA. SGLang 0.5.17 leaves them in ``/tmp`` and in the home folder, and
    so does the fast path of training. Extensions are what DeepSpeed builds in C++.
    """
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
        "TRITON_CACHE_DIR": str(root / "triton"),
        "TORCH_EXTENSIONS_DIR": str(root / "extensions"),
        "CUDA_CACHE_PATH": str(root / "nv"),
        "TILELANG_CACHE_DIR": str(root / "tilelang"),
        "TVM_FFI_CACHE_DIR": str(root / "tvm-ffi"),
        "FLASHINFER_WORKSPACE_BASE": str(root),  # it appends .cache/flashinfer
    }
