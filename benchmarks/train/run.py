"""Training measured on one GPU: the toolkit, and others by the same harness on the same shape.

    python benchmarks/train/run.py --out ~/results [--only device,ours-auto-bf16,...] [--budget-s 250]

Every case is a process of its own, tried at its largest batch first. Its numbers are written after
each step and kept in OUT/results.json; a second call with the same OUT takes only what is missing.
``report.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [
    str(ROOT),
    *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks" / "train"),
]

from benchmarks.train import case as process  # noqa: E402
from benchmarks.train import cases as table  # noqa: E402
from benchmarks.train.cases import Case  # noqa: E402
from benchmarks.train.results import Results  # noqa: E402

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "DISABLE_VERSION_CHECK": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for a GPU must not open it before a fork
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="for results.json, cases/, logs/")
    parser.add_argument("--only", help=f"cases, in this order: {', '.join(table.BY_NAME)}")
    parser.add_argument("--budget-s", type=float, default=570)
    parser.add_argument("--again", action="store_true", help="measure the named cases anew")
    parser.add_argument(
        "--all-batches", action="store_true", help="every batch, not the first that fits"
    )
    parser.add_argument(
        "--cache", type=Path, help="compiled kernels; default OUT/cache, shared by all"
    )
    parser.add_argument(
        "--train-site", type=Path, help="packages the interpreter lacks: peft, trl, ..."
    )
    parser.add_argument("--unsloth-site", type=Path, help="Unsloth and what it pins")
    parser.add_argument("--llamafactory-site", type=Path, help="LLaMA-Factory and what it pins")
    parser.add_argument(
        "--core-site", type=Path, help="pydantic, mlflow: for the stage case's worker"
    )
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--quick", action="store_true", help="fewer steps, for a first look")
    parser.add_argument(
        "--no-fork", action="store_true", help="import everything anew in every case"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and what is there")
    return parser.parse_args()


def main() -> None:
    """Measure one case after the other; a failed one is noted and the next is taken."""
    options = parse()
    end = time.monotonic() + options.budget_s
    chosen = table.chosen(options.only, tiny=options.shape == "tiny")
    for name in ("cases", "logs"):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    cache = (options.cache or options.out / "cache").absolute()
    os.environ.update(QUIET | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(cache / "unsloth"),
    })  # fmt: skip
    results = Results(options.out / "results.json")
    if options.list:
        for case in chosen:
            print(f"{case.name:24} {results.state(case)}")
        return
    bench = Bench(options, results, cache, lambda: end - time.monotonic())
    for case in chosen:
        if options.again:
            results.forget(case.name)
        bench.take(case.quick() if options.quick else case)
    print(results.short_table(chosen))


class Bench:
    """Starts the processes and keeps what they leave."""

    def __init__(
        self, options: argparse.Namespace, results: Results, cache: Path, room: Callable[[], float]
    ) -> None:
        self.options, self.results, self.cache, self.room = options, results, cache, room
        self._imports_s: float | None = None

    def take(self, case: Case) -> None:
        """Measure a case at its largest batch that fits, unless that was done."""
        for batch in case.batches:
            name = f"{case.name}/b{batch}"
            known = self.results.get(name)
            if known is None:
                if self.room() < min(case.expected_s, self.options.budget_s):
                    print(f"{name}: not begun, {self.room():.0f} s are left", flush=True)
                    return
                known = self._measured(case, batch, name)
            if "tokens_per_s" in known and not self.options.all_batches:
                return
            if "error" in known:
                if case.instead:
                    (other,) = table.chosen(case.instead, tiny=case.shape == "tiny")
                    self.take(other.quick() if self.options.quick else other)
                return

    def _measured(self, case: Case, batch: int, name: str) -> dict[str, Any]:
        began = time.monotonic()
        label = name.replace("/", "-")
        file = (self.options.out / "cases" / f"{label}.json").absolute()
        file.unlink(missing_ok=True)
        folders = {
            "file": str(file),
            "cache": str(self.cache),
            "models": str((self.options.out / "models").absolute()),
            "core_site": str(self.options.core_site or ""),
            "train_site": str(self.options.train_site or ""),
            "scratch": str((self.options.out / "scratch").absolute()),
        }
        log = self.options.out / "logs" / f"{label}.log"
        code = self._run(case, batch, folders, log)
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if code not in (process.DONE, process.OUT_OF_MEMORY) and "error" not in found:
            found["error" if "tokens_per_s" not in found else "cut_off"] = ending(code, log)
        found["case_s"] = round(time.monotonic() - began, 1)
        self.results.add(name, found)
        print(
            f"== {name}: {said(found)}; {found['case_s']} s, {self.room():.0f} s left", flush=True
        )
        return found

    def _run(self, case: Case, batch: int, folders: dict[str, str], log: Path) -> int:
        forks = case.site == "train" and not self.options.no_fork
        if forks and self._preload():
            code = self._forked(case, batch, folders, log)
            if code != process.POISONED:
                return code
            print("a forked process cannot use the GPU here: starting new ones", flush=True)
            self.options.no_fork = True
        return self._started(case, batch, folders, log)

    def _preload(self) -> bool:
        """Import once what the cases share; whether they can be forked from here."""
        if self._imports_s is None:
            began = time.monotonic()
            if self.options.train_site:
                sys.path.insert(0, str(self.options.train_site))
            import_shared()
            self._imports_s = time.monotonic() - began
            print(f"imports: {self._imports_s:.1f} s", flush=True)
        import torch

        if torch.cuda.is_initialized():
            print("an import opened the GPU: starting new processes instead of forking", flush=True)
            self.options.no_fork = True
        return not self.options.no_fork

    def _forked(self, case: Case, batch: int, folders: dict[str, str], log: Path) -> int:
        sys.stdout.flush()
        began, allowed = time.time(), self._allowed(case)
        child = os.fork()
        if child == 0:
            self._be_child(case, batch, folders, log, began)
        pid, status = 0, 0
        while not pid:
            if time.time() - began > allowed:
                end_group(child)
            pid, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.02)
        end_group(child)
        return os.waitstatus_to_exitcode(status)

    def _be_child(
        self, case: Case, batch: int, folders: dict[str, str], log: Path, began: float
    ) -> NoReturn:
        """Measure, and end here whatever happens: the rest of this program is the parent's."""
        code = process.FAILED
        try:
            os.setsid()
            os.environ.update(case.variables)
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = process.run(case, batch, folders, began, self._imports_s or 0.0)
        except BaseException:  # noqa: BLE001 - nothing may leave this function
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _allowed(self, case: Case) -> float:
        """Seconds that a process may take: one that hangs must not take the others' time."""
        return max(1.0, min(self.room(), 3 * case.expected_s + 30))

    def _started(self, case: Case, batch: int, folders: dict[str, str], log: Path) -> int:
        asked = Path(folders["file"]).with_suffix(".asked")
        asked.write_text(process.as_file(case, batch, folders, time.time()))
        site = getattr(self.options, f"{case.site}_site")
        sites = dict.fromkeys([site, self.options.train_site])  # its own packages come first
        found = [str(site.absolute()) for site in sites if site]
        found += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        env = os.environ | dict(case.variables) | {"PYTHONPATH": os.pathsep.join(found)}
        with log.open("wb") as file:
            child = subprocess.Popen(
                [sys.executable, str(ROOT / "benchmarks" / "train" / "case.py"), str(asked)],
                env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        try:
            return child.wait(self._allowed(case))
        except subprocess.TimeoutExpired:
            end_group(child.pid)
            return child.wait()
        finally:
            end_group(child.pid)


def end_group(leader: int) -> None:
    """End a case's process with the compile workers that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def import_shared() -> None:
    """Import what most cases use, without opening the GPU: a forked process could not use it then.

    bitsandbytes asks for the compute capability while it is imported, which opens it; it gets the
    answer that nvidia-smi gives.
    """
    import importlib

    import torch

    from benchmarks.train.results import compute_capability

    asked = torch.cuda.get_device_capability
    known = compute_capability()
    if known:
        torch.cuda.get_device_capability = lambda _device=None: known
    for name in ("transformers.models.llama.modeling_llama", "transformers.trainer", "peft",
                 "bitsandbytes", "torch._inductor.compile_fx", "liger_kernel.transformers",
                 "datasets", "trl", "toolkit.recipe.train", "toolkit.train.sft"):  # fmt: skip
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not imported: {error}", flush=True)
    torch.cuda.get_device_capability = asked


def ending(code: int, log: Path) -> str:
    """Why a process that left no word ended."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"ended by {how}: {lines[-1] if lines else 'it wrote nothing'}"


def said(found: dict[str, Any]) -> str:
    """A result in a few words."""
    for key in ("error", "out_of_memory", "cut_off"):
        if key in found and "tokens_per_s" not in found:
            return f"{key}: {found[key]}"
    if "bf16_matmul_tflops" in found:
        return f"{found['bf16_matmul_tflops']} TFLOP/s"
    return f"{found.get('tokens_per_s', 0):,.0f} tokens/s, {found.get('peak_reserved_gib', 0)} GiB"


if __name__ == "__main__":
    main()
