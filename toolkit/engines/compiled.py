"""Where engines keep what they compile: one folder per environment, so that a second start finds it.

Compiled kernels fit the packages they were made with, so each lock has a folder of its own under the cache. It is the
user's alone (0700): engines load what lies there as code.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.environments.resolve import RECORD
from toolkit.workspace import cache_root, private_folder

if TYPE_CHECKING:
    from toolkit.stages import Interpreter

SHOWN = 16
"""Hex digits that name the folder of an interpreter that no lock made."""


def folder(interpreter: Interpreter) -> Path:
    """The folder for what an environment's programs compile; made where it is new, absolute."""
    return private_folder(cache_root().absolute() / "compiled" / _key(interpreter))


def _key(interpreter: Interpreter) -> str:
    """Name and digest of the lock; for a profile's interpreter a digest of where its packages lie."""
    built = interpreter.python.parent.parent
    if (built / RECORD).is_file():
        return built.name
    places = "\n".join(map(str, (interpreter.python, *interpreter.pythonpath)))
    return f"given-{hashlib.sha256(places.encode()).hexdigest()[:SHOWN]}"


def variables(root: Path) -> dict[str, str]:
    """What every engine's libraries read, whichever engine it is.

    vLLM moves Inductor's and Triton's caches below its own while it compiles; the variables are for kernels that are
    compiled outside of that, such as those of LoRA. SGLang 0.5.17 leaves them in ``/tmp`` and in the home folder.
    """
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
        "TRITON_CACHE_DIR": str(root / "triton"),
        "CUDA_CACHE_PATH": str(root / "nv"),
        "TILELANG_CACHE_DIR": str(root / "tilelang"),
        "TVM_FFI_CACHE_DIR": str(root / "tvm-ffi"),
        "FLASHINFER_WORKSPACE_BASE": str(root),  # it appends .cache/flashinfer
    }
