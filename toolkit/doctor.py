"""What a machine has and lacks for the toolkit's work. Each check is one function and one row."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from toolkit.environments import Environment, detect_accelerator, read_record, resolve
from toolkit.environments.build import stale_parts
from toolkit.environments.uv import uv
from toolkit.errors import NotInstalledError
from toolkit.workspace import Workspace, cache_root

if TYPE_CHECKING:
    from toolkit.launch.profiles import Profile

GIB = 2**30
ROOM_GIB = {"cpu": 8, "cuda": 40}
"""Free disk that environments, models and runs want, GiB; less is worth a note."""
TIMEOUT_S = 5


class Verdict(StrEnum):
    """What a check found."""

    ok = "ok"
    note = "note"
    """Worth knowing; work goes on without."""
    missing = "missing"
    """Needed, and not there."""


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    verdict: Verdict
    found: str
    mend: str = ""
    """The command or step that mends it."""


def examine(
    needed: Sequence[str],
    workspace: Workspace,
    profile: Profile | None = None,
    tracking_uri: str | None = None,
) -> list[Check]:
    """Look at everything once; takes about a second.

    Args:
        needed: Logical environments that must be there.
        workspace: Where runs would go.
        profile: Where steps would run.
        tracking_uri: The recipe's MLflow store, if it names one.
    """
    environments = [resolve(name, profile=profile) for name in needed]
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or workspace.mlflow_uri
    return [
        _python(),
        _uv(needed=any(environment.path for environment in environments)),
        *_bytecode(),
        _machine(),
        _gpu(),
        _disk(profile),
        *map(_environment, environments),
        _workspace(workspace),
        _store(uri),
        *_leftovers(),
    ]


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    fits = sys.version_info >= (3, 11)
    return Check("python", Verdict.ok if fits else Verdict.missing, found, "" if fits else "3.11+")


def _uv(*, needed: bool) -> Check:
    """Whether uv is here; where a profile names the interpreters there is nothing for it to build."""
    try:
        program = uv()
    except NotInstalledError as error:
        verdict = Verdict.missing if needed else Verdict.note
        return Check("uv", verdict, error.message, error.hint or "")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return Check("uv", Verdict.ok, done.stdout.strip() or program)


def _bytecode() -> Iterator[Check]:
    """Images often set this; here it makes each of a run's processes compile torch and its like again."""
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        found = "PYTHONDONTWRITEBYTECODE is set: every step compiles its libraries anew"
        yield Check("bytecode", Verdict.note, found, "unset PYTHONDONTWRITEBYTECODE")


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Check("machine", Verdict.ok, f"{cores} cores, {memory:.0f} GiB memory")


def _gpu() -> Check:
    program = shutil.which("nvidia-smi")
    if program is None:
        there = Path("/dev/nvidia0").exists()
        found = "an NVIDIA device without nvidia-smi" if there else "none: work is done on the CPU"
        return Check("gpu", Verdict.note, found)
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, check=False, timeout=4 * TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Check("gpu", Verdict.missing, "nvidia-smi does not answer", "look at the driver")
    if done.returncode:
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        return Check("gpu", Verdict.missing, f"nvidia-smi failed: {said}", "look at the driver")
    return Check("gpu", Verdict.ok, "; ".join(done.stdout.strip().splitlines()))


def _disk(profile: Profile | None) -> Check:
    folder = cache_root().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    want = ROOM_GIB[profile.device if profile else detect_accelerator()]
    found = f"{free:.0f} GiB free for {cache_root()}"
    if free >= want:
        return Check("disk", Verdict.ok, found)
    return Check(
        "disk", Verdict.note, f"{found}; {want} are wanted", "set TOOLKIT_CACHE to a bigger disk"
    )


def _environment(environment: Environment) -> Check:
    name = f"environment {environment.name}"
    try:
        environment.interpreter()
    except NotInstalledError as error:
        return Check(name, Verdict.missing, error.message, error.hint or "")
    built = read_record(environment)
    if built is None:
        return Check(name, Verdict.ok, str(environment.python))
    found = f"{built.lock}, Python {built.python}, {built.size_bytes / GIB:.1f} GiB"
    return Check(name, Verdict.ok, found)


def _workspace(workspace: Workspace) -> Check:
    folder = workspace.root
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check("workspace", Verdict.ok, str(workspace.root))
    except OSError as error:
        found = f"{workspace.root} cannot be written: {error.strerror}"
        return Check("workspace", Verdict.missing, found, "give --workspace or TOOLKIT_WORKSPACE")


def _store(uri: str) -> Check:
    """Whether the MLflow store answers; a file is looked at, a server is asked for its health."""
    if not uri.startswith(("http://", "https://")):
        return Check("mlflow store", Verdict.ok, uri)
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT_S):  # noqa: S310 - http(s), see above
            return Check("mlflow store", Verdict.ok, uri)
    except HTTPError as error:  # it answers, and may want a login
        return Check("mlflow store", Verdict.ok, f"{uri} (HTTP {error.code})")
    except (URLError, OSError) as error:
        found = f"{uri} does not answer: {getattr(error, 'reason', error)}"
        return Check("mlflow store", Verdict.missing, found, "start it, or unset tracking.uri")


def _leftovers() -> Iterator[Check]:
    for part in stale_parts(cache_root() / "environments"):
        lock = part.stem.rpartition("-")[0]
        mend = f"toolkit env sync {lock} (or remove the folder)"
        yield Check("unfinished build", Verdict.note, str(part), mend)
