"""Builds an environment from its lock with uv: complete or absent, once per user and lock.

uv fills ``<folder>.part``, a relocatable venv, and one rename makes it the environment. A build
that was killed leaves only a ``.part`` folder, which the next build throws away. Builds of one lock
wait for each other on a file lock that uv inherits, so a uv that outlives its killed parent is
waited for too and never writes into the folder of its successor.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.environments.lockfile import Lock, load_lock
from toolkit.environments.resolve import RECORD, Environment
from toolkit.environments.uv import torch_source, uv, uv_environ
from toolkit.errors import NotInstalledError, ToolkitError
from toolkit.workspace import private_folder

Report = Callable[[str], None]
POLL_S = 0.25

FROM_SOURCE = {"deepspeed": {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}}
"""Packages that have no wheel, with the variables that build one. They import torch while they are built,
so they are built in the environment, after its other packages, with nothing but those: all by hash."""


@dataclass(frozen=True)
class Built:
    """What an environment was built from and what that took; ``toolkit.json`` inside it."""

    lock: str
    digest: str
    python: str
    packages: int
    size_bytes: int
    seconds: float


def read_record(environment: Environment) -> Built | None:
    """What a built environment says of itself; ``None`` where nothing was built."""
    if environment.path is None or not environment.is_ready:
        return None
    return Built(**json.loads((environment.path / RECORD).read_text()))


def stale_parts(folder: Path) -> list[Path]:
    """Unfinished builds that no process is working on any more."""
    parts = sorted(folder.glob("*.part"))
    return [part for part in parts if not _is_locked(part.with_suffix(".lock"))]


def sync(environment: Environment, report: Report = lambda _: None) -> Built | None:
    """Build an environment unless it is there; ``None`` where there is nothing to build.

    Args:
        environment: From :func:`toolkit.environments.resolve`.
        report: Called several times a second with what is being done.

    Raises:
        NotInstalledError: A profile's interpreter is not there, or uv, Python or a package cannot
            be had.
    """
    if environment.path is None or environment.lock is None or environment.lock == "core":
        environment.interpreter()
        return None
    private_folder(environment.path.parent)
    with _only_one(environment.path.with_name(f"{environment.path.name}.lock"), report) as held:
        return read_record(environment) or _build(
            environment.path, load_lock(environment.lock), report, held
        )


def _build(target: Path, lock: Lock, report: Report, held: int) -> Built:
    start = time.monotonic()
    part = target.with_name(f"{target.name}.part")
    log = target.with_name(f"{target.name}.log")
    # A target without its record, or whose Python is gone, is no environment.
    for leftover in (part, target):
        if leftover.exists():
            report(f"removing what is left of {leftover.name}")
            shutil.rmtree(leftover)
    log.write_text("")
    venv = [
        "venv",
        "--quiet",
        "--no-project",
        "--relocatable",
        "--python",
        _python(lock.python),
        str(part),
    ]
    _uv(venv, log, held, lambda: report(f"making a venv with Python {lock.python}"), lock)
    total = len(lock.pins)
    torch = torch_source() if lock.accelerator == "cpu" else []
    packages = [
        "pip",
        "install",
        "--require-hashes",
        "--python",
        str(part / "bin" / "python"),
        *torch,
        *(f"--no-build-isolation-package={name}" for name in FROM_SOURCE if name in lock.pins),
        "-r",
        str(lock.path),
    ]
    _uv(
        packages,
        log,
        held,
        lambda: report(f"{_installed(part)}/{total} packages  {_last_line(log)}"),
        lock,
    )
    report("measuring")
    built = Built(
        lock.name, lock.digest, lock.python, _installed(part), _size(part), time.monotonic() - start
    )
    (part / RECORD).write_text(json.dumps(asdict(built), indent=2))
    part.rename(target)
    return built


def _python(version: str) -> str:
    """The Python to make a venv with: the one below our own if it fits, else uv's choice."""
    own = Path(sys.base_prefix) / "bin" / f"python{version}"
    return str(own) if own.exists() else version


def _uv(
    arguments: Sequence[str], log: Path, held: int, tick: Callable[[], None], lock: Lock
) -> None:
    """Run uv with its output in the log, ticking while it works."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [uv(), *arguments],
            env=uv_environ() | _build_variables(lock),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(held,),
        )
        try:
            tick()
            while not _ended(process):
                tick()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        raise explain(log.read_text(), lock, log)


def _build_variables(lock: Lock) -> dict[str, str]:
    """What packages without a wheel want to be told while they are built."""
    told = (variables for name, variables in FROM_SOURCE.items() if name in lock.pins)
    return {key: value for variables in told for key, value in variables.items()}


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it ended within a moment."""
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def explain(text: str, lock: Lock, log: Path) -> ToolkitError:
    """What uv's log of a failed build means, and what to do about it."""
    for sign, message, hint in _causes(lock):
        if sign in text:
            return NotInstalledError(
                f"environment {lock.name} cannot be built: {message} (log: {log})", hint
            )
    tail = "\n".join(text.strip().splitlines()[-8:])
    return NotInstalledError(
        f"environment {lock.name} cannot be built; uv said:\n{tail}", f"the whole log: {log}"
    )


def _causes(lock: Lock) -> Iterator[tuple[str, str, str]]:
    """Signs in uv's output, most telling first, with what they mean and what mends it."""
    no_python = (
        f"Python {lock.python} is not on this machine and uv could not download it",
        f"install python{lock.python}, let uv reach its downloads, or name one in a profile",
    )
    yield ("python-build-standalone", *no_python)
    yield ("No interpreter found", *no_python)
    yield (
        "No space left on device",
        "the disk is full",
        "set TOOLKIT_CACHE (and UV_CACHE_DIR) to folders with more room",
    )
    yield (
        "Hash mismatch",
        "a package is not the file that the lock names",
        "another index or find-links folder than the lock's: use that one, or run `make lock`",
    )
    torch = lock.pins.get("torch", "")
    wheel = f"set UV_FIND_LINKS to a folder that has the wheel of torch {torch}"
    yield ("download.pytorch.org", "PyTorch's index could not be read", wheel)
    if "+" in torch:
        yield (f"torch=={torch}", f"torch {torch} was not found", wheel)
    yield (
        "error sending request",
        "the package index could not be reached",
        "set UV_DEFAULT_INDEX (or PIP_INDEX_URL), or name an interpreter in a profile",
    )


@contextmanager
def _only_one(path: Path, report: Report) -> Iterator[int]:
    """Hold the file lock at ``path``; children that inherit the descriptor hold it too."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while not _try_lock(descriptor):
            report("waiting for another process that builds it")
            time.sleep(POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)  # frees the lock, unless a uv of ours still has it


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _installed(venv: Path) -> int:
    """Distributions in a venv."""
    return sum(1 for _ in venv.glob("lib/python*/site-packages/*.dist-info"))


def _size(folder: Path) -> int:
    """Bytes of the files below ``folder``; what uv linked from its cache takes no further room."""
    return sum(
        (Path(base) / name).lstat().st_size for base, _, names in os.walk(folder) for name in names
    )


def _last_line(log: Path) -> str:
    """What uv said last, without its indentation."""
    lines = log.read_text().strip().splitlines()
    return lines[-1].strip() if lines else "resolving"
