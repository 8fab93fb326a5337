"""From a logical name to an interpreter; cheap, because ``toolkit plan`` asks for all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from toolkit.environments.lockfile import DIGEST_SHOWN, load_lock
from toolkit.errors import NotInstalledError, UsageError
from toolkit.registry import close_match
from toolkit.workspace import cache_root

if TYPE_CHECKING:
    from toolkit.launch.profiles import EnvironmentSection, Profile
    from toolkit.stages import Interpreter

NAMES = ("core", "train", "quantize", "vllm", "sglang", "router")
"""Logical environments that stages and engines ask for."""

ONE_LOCK = {"sglang": "sglang-cuda", "router": "router"}
"""Environments with one lock: a plan can be made anywhere, preflight says what a machine lacks."""

RECORD = "toolkit.json"
"""Written into an environment last; says what it was built from."""


@dataclass(frozen=True)
class Environment:
    """An interpreter that is, or can be made.

    Attributes:
        name: Logical name, or the lock's where one was asked for by that.
        lock: Name of the lock it is built from; ``None`` where a profile gives an interpreter.
        digest: SHA-256 (hex) of the lock file or of the profile's entry: part of a step's
            fingerprint.
        python: The interpreter, whether or not it is there yet.
        path: Folder that ``toolkit env sync`` builds; ``None`` where there is nothing to build.
        pythonpath: Folders put before its own packages.
        variables: Environment variables set for it.
    """

    name: str
    lock: str | None
    digest: str
    python: Path
    path: Path | None = None
    pythonpath: tuple[Path, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """Whether it can be used now."""
        built = self.path is None or (self.path / RECORD).is_file()
        return built and self.python.exists() and all(folder.is_dir() for folder in self.pythonpath)

    def interpreter(self) -> Interpreter:
        """The interpreter to start processes with.

        Raises:
            NotInstalledError: It is not built, or the profile names what is not there.
        """
        from toolkit.stages import Interpreter

        if not self.is_ready:
            raise self._missing()
        return Interpreter(self.python, self.pythonpath, self.variables)

    def _missing(self) -> NotInstalledError:
        if self.path is not None:
            text = f"environment {self.name!r} (lock {self.lock}) is not built"
            return NotInstalledError(text, f"toolkit env sync {self.name}")
        absent = next((p for p in (self.python, *self.pythonpath) if not p.exists()), self.python)
        text = f"environment {self.name!r}: the profile names {absent}, which is not there"
        return NotInstalledError(text, f"mend environments.{self.name} in the profile")


def detect_accelerator() -> Literal["cpu", "cuda"]:
    """``cuda`` where an NVIDIA device or its tools are, else ``cpu``."""
    gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    return "cuda" if gpu else "cpu"


def resolve(name: str, *, accelerator: str = "auto", profile: Profile | None = None) -> Environment:
    """The environment that a logical name means here.

    Args:
        name: One of :data:`NAMES`.
        accelerator: ``cpu``, ``cuda``, or ``auto`` for what the profile says or else this machine
            has.
        profile: Where the steps will run; it may give an interpreter or another lock.

    Raises:
        UsageError: No environment has this name.
    """
    if name not in NAMES:
        raise UsageError(
            f"no environment is named {name!r}{close_match(name, NAMES)}",
            f"known: {', '.join(NAMES)}",
        )
    if name == "core":
        # On a host where the core's packages stand in folders of their own, PYTHONPATH is how it runs.
        folders = tuple(Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
        digest = load_lock("core").digest
        return Environment("core", "core", digest, Path(sys.executable), pythonpath=folders)
    section = profile.environments.of(name) if profile else None
    if section and section.python:
        return _from_profile(name, section, profile.folder if profile else None)
    if section and section.lock:
        return from_lock(section.lock, name=name, variables=section.variables)
    if accelerator == "auto" and profile:
        accelerator = profile.accelerator
    if accelerator == "auto":
        accelerator = detect_accelerator()
    lock = ONE_LOCK.get(name, f"{name}-{accelerator}")
    return from_lock(lock, name=name, variables=section.variables if section else {})


def from_lock(
    lock: str, *, name: str | None = None, variables: Mapping[str, str] | None = None
) -> Environment:
    """The environment built from a lock, whatever this machine's accelerator is."""
    digest = load_lock(lock).digest
    path = cache_root() / "environments" / f"{lock}-{digest[:DIGEST_SHOWN]}"
    path = path.absolute()
    return Environment(
        name or lock, lock, digest, path / "bin" / "python", path, variables=variables or {}
    )


def _from_profile(name: str, section: EnvironmentSection, folder: Path | None) -> Environment:
    """An interpreter that a profile names; a bare program name is looked up on PATH."""
    written = section.model_dump_json(include={"python", "pythonpath", "variables"})
    digest = hashlib.sha256(json.dumps(json.loads(written), sort_keys=True).encode()).hexdigest()
    python = os.path.expandvars(section.python or "")
    if os.sep not in python:
        python = shutil.which(python) or python
    return Environment(
        name,
        None,
        digest,
        _place(python, folder),
        pythonpath=tuple(_place(os.path.expandvars(entry), folder) for entry in section.pythonpath),
        variables=section.variables,
    )


def _place(text: str, folder: Path | None) -> Path:
    """A profile's path, absolute from its folder; links stay, because a venv's Python is one."""
    return ((folder or Path.cwd()) / Path(text).expanduser()).absolute()
