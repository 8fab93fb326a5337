"""The process of one stage, as its worker sees it: started, followed to its end, stopped.

The other side of this talk is ``stages/__main__.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import errors
from toolkit.environments import compiled
from toolkit.errors import StepFailedError
from toolkit.stages import Interpreter
from toolkit.tracking import Store

if TYPE_CHECKING:
    from toolkit.worker import StepSpec

STOP_DEADLINE_S = 60.0
"""How long a stage may take to write a checkpoint after SIGTERM, where no job says so."""

GRACE = "TOOLKIT_GRACE_S"
"""Environment variable: how long it may in a job, which is the profile's ``grace_s``."""

TRACEBACK_CHARACTERS = 20_000
"""How much of a log goes to MLflow as the traceback of a step that left none."""


@dataclass(frozen=True)
class Outcome:
    """What a stage process left: its numbers and what it cost."""

    metrics: dict[str, float]
    facts: dict[str, Any]
    seconds: float
    peak_memory_gib: float


def run_stage(
    spec: StepSpec, step_file: Path, show: Callable[[Mapping[str, Any]], None]
) -> Outcome:
    """Start the stage's process, forward its events until it ends, and read its last word.

    Raises:
        ToolkitError: The stage's own error, or StepFailedError when it crashed or was killed.
    """
    state, started = Path(spec.state), time.monotonic()
    for name in ("result.json", "error.json"):
        (state / name).unlink(missing_ok=True)
    reader, writer = os.pipe()
    interpreter = _interpreter(spec)
    with (state / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            _command(interpreter, step_file),
            env=_environ(interpreter, spec) | {"TOOLKIT_EVENTS_FD": str(writer)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            start_new_session=True,
        )
    os.close(writer)
    try:
        status, usage = _follow(process, reader, show)
    finally:
        _stop(process)
        os.close(reader)
    if status != 0:
        raise _failure(spec, status)
    result = json.loads((state / "result.json").read_text())
    peak_gib = usage.ru_maxrss / 2**20  # Linux counts KiB
    return Outcome(
        result["metrics"], result["facts"], time.monotonic() - started, round(peak_gib, 3)
    )


def join_stage(spec: StepSpec, step_file: Path) -> int:
    """On another node than the first: run this node's ranks, and nothing else; return their exit code.

    Result, errors and artifact are the first node's matter.
    """
    interpreter = _interpreter(spec)
    process = subprocess.Popen(
        _command(interpreter, step_file),
        env=_environ(interpreter, spec),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait()
    finally:
        _stop(process)


def _interpreter(spec: StepSpec) -> Interpreter:
    own = next(iter(spec.environments.values()))
    return Interpreter(Path(own["python"]), tuple(map(Path, own["pythonpath"])), own["variables"])


def _command(interpreter: Interpreter, step_file: Path) -> list[str]:
    program = Path(__file__).parent / "stages" / "__main__.py"
    return [str(interpreter.python), str(program), str(step_file)]


def _environ(interpreter: Interpreter, spec: StepSpec) -> dict[str, str]:
    """The stage's variables: its own programs first, then the core's (uv), then the user's.

    ``models:/`` means the store that runs go to, so that fetch finds there what a run registered.
    """
    environ = interpreter.environ()
    own, _, others = environ["PATH"].partition(os.pathsep)
    path = os.pathsep.join((own, str(Path(sys.executable).parent), others))
    return {
        **_caches(interpreter, spec),
        **environ,
        "PATH": path,
        "TOOLKIT_PARENT": str(os.getpid()),
        "MLFLOW_TRACKING_URI": Store.read(spec.store).uri,
    }


def _caches(interpreter: Interpreter, spec: StepSpec) -> dict[str, str]:
    """Where the stage keeps what it compiles. The core compiles nothing; its engines have folders of their own."""
    if next(iter(spec.environments)) == "core":
        return {}
    folder = compiled.folder(interpreter)
    return compiled.variables(folder) if folder else {}


def _follow(
    process: subprocess.Popen[bytes], reader: int, show: Callable[[Mapping[str, Any]], None]
) -> tuple[int, Any]:
    """Forward events until the process ends; return its exit code (negative: signal) and resource usage."""
    pending = b""
    while True:
        ready, _, _ = select.select([reader], [], [], 0.5)
        chunk = os.read(reader, 1 << 16) if ready else b""
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            show(json.loads(line))
        if not chunk:
            show({"event": "tick"})
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return process.returncode, usage
            if ready:  # end of file while the process still ends
                time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a stage that still runs, with everything it started: first kindly, then for good."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(float(os.environ.get(GRACE, STOP_DEADLINE_S)))
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _failure(spec: StepSpec, status: int) -> errors.ToolkitError:
    """The error that a failed stage left, or what its end tells."""
    log = Path(spec.state) / "log.txt"
    report = Path(spec.state) / "error.json"
    if report.exists():
        said = json.loads(report.read_text())
        known = getattr(errors, said["type"], None)
        if (
            isinstance(known, type)
            and issubclass(known, errors.ToolkitError)
            and known is not errors.RecipeError
        ):
            return known(f"step {spec.step}: {said['message']}", said["hint"])
        return StepFailedError(f"step {spec.step}: {said['message']}", f"the traceback is in {log}")
    if status < 0:
        name = signal.Signals(-status).name
        cause = (
            " (SIGKILL that nobody sent is the kernel out of memory)"
            if -status == signal.SIGKILL
            else ""
        )
        return StepFailedError(
            f"step {spec.step}: its process was ended by {name}{cause}", f"its log is {log}"
        )
    return StepFailedError(
        f"step {spec.step}: its process ended with {status}: {_last_line(log)}", f"its log is {log}"
    )


def left_traceback(state: Path) -> str | None:
    """The traceback of a stage that failed: its own words, else the end of its log."""
    report, log = state / "error.json", state / "log.txt"
    said = json.loads(report.read_text()).get("traceback") if report.exists() else None
    if said or not log.exists():
        return said
    return log.read_text(errors="replace")[-TRACEBACK_CHARACTERS:]


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"
