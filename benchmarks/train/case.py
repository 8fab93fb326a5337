"""One case, in a process of its own: ``python case.py CASE.JSON``.

``run.py`` calls :func:`run` in a process forked from one that has torch and Transformers imported
already, or starts this file where a case has other packages. Exit codes: 0 measured, 3 out of
memory, 4 this process cannot use the GPU because its parent did, 1 anything else.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    here = Path(__file__).resolve()
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here.parent]
    sys.path.insert(0, str(here.parents[2]))

from benchmarks.train.cases import Case

PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "trl", "liger-kernel",
            "bitsandbytes", "torchao", "datasets", "unsloth", "unsloth_zoo", "llamafactory")  # fmt: skip
SHARED = ("torch", "transformers.models.llama.modeling_llama")
FIRST = {"unsloth": ("unsloth",), "llamafactory": ("transformers",)}
"""What is imported before anything else: Unsloth patches what comes after it."""
DONE, FAILED, OUT_OF_MEMORY, POISONED = 0, 1, 3, 4


def run(case: Case, batch: int, folders: dict[str, str], began: float, imports_s: float) -> int:
    """Measure; the numbers and errors are in ``folders["file"]``."""
    import torch

    from benchmarks.train.clock import Clock
    from benchmarks.train.shapes import model_folder

    if torch.cuda.is_available() and not _opens_gpu():
        return POISONED
    facts: dict[str, Any] = {
        "subject": case.subject,
        "settings": dict(case.settings),
        "variables": dict(case.variables),
        "shape": case.shape,
        "batch": batch,
        "sequence": case.sequence,
        "rows": case.rows,
        "limit_gib": case.limit_gib,
        "imports_s": round(imports_s, 2),
        "compiled_files_found": _files(folders["cache"]),
        "packages": _versions(),
    }
    clock = Clock(Path(folders["file"]), case.warm, case.steps, began, facts)
    try:
        from benchmarks.train import weights

        if torch.cuda.is_available() and case.subject != "stage":
            hold_to_limit(case)
        folder = model_folder(case.shape, Path(folders["models"]))
        weights.install()
        subject = importlib.import_module(f"benchmarks.train.subjects.{case.subject}")
        subject.measure(case, batch, folder, clock)
        return DONE
    except torch.OutOfMemoryError as error:
        facts["out_of_memory"] = str(error).partition(". ")[0]
        return OUT_OF_MEMORY
    except Exception as error:  # noqa: BLE001 - one that fails is written down, and the next is measured
        traceback.print_exc()
        facts["error"] = f"{type(error).__name__}: {error}"[:1500]
        return FAILED
    finally:
        clock.write()


def hold_to_limit(case: Case) -> None:
    """Give PyTorch's allocator what the case may take of the GPU."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, case.limit_gib * 2**30 / total))


def _opens_gpu() -> bool:
    """Whether this process can use the GPU: not when the one it was forked from did."""
    import torch

    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def _files(cache: str) -> int:
    """Compiled kernels that lie there already: 0 is a cold start."""
    return sum(1 for path in Path(cache).rglob("*") if path.is_file())


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_file(case: Case, batch: int, folders: dict[str, str], began: float) -> str:
    """What this file reads when it is started."""
    return json.dumps({"case": asdict(case), "batch": batch, "folders": folders, "began": began})


def main(path: str) -> int:
    """Run the case in a file."""
    asked = json.loads(Path(path).read_text())
    values = asked["case"] | {"batches": tuple(asked["case"]["batches"])}
    began = time.time()
    for name in FIRST.get(values["subject"], SHARED):
        importlib.import_module(name)
    code = run(
        Case(**values), asked["batch"], asked["folders"], asked["began"], time.time() - began
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a trainer must not hold the next case up


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
