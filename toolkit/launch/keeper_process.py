"""The way to the keeper: a mark in its inbox, and a keeper that runs.

One for each workspace and machine::

    <workspace>/jobs/keeper/<host>/
    ├── lock            held by the keeper while it lives
    ├── inbox/<chain>   look at this chain: it is new, or something of it changed
    ├── dbos.sqlite     its queue
    └── log.txt
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

from toolkit import resources
from toolkit.engines.guard import processes
from toolkit.errors import NotInstalledError
from toolkit.launch import causes, detached
from toolkit.launch.locks import is_held
from toolkit.workspace import private_folder

_started: list[subprocess.Popen[bytes]] = []
"""Keepers that this process started: so that they are collected when they end before it does."""


def place(jobs: Path) -> Path:
    """The keeper's folder on this machine."""
    return private_folder(jobs / "keeper" / causes.host())


def ask(chain: Path) -> None:
    """Have the keeper look at a chain; start one unless it runs.

    Raises:
        NotInstalledError: Its queue is not installed.
    """
    require()
    mark(chain)
    ensure(chain.parent)


def require() -> None:
    """Refuse where no keeper can run.

    Raises:
        NotInstalledError: Its queue is not installed.
    """
    if find_spec("dbos") is None:
        raise NotInstalledError(
            "jobs need a queue on this machine, and the package dbos is not installed",
            "pip install 'dbos>=3.4,<4'; without jobs: --profile instead of --on",
        )


def mark(chain: Path) -> None:
    """Have a keeper that runs look at a chain."""
    (private_folder(place(chain.parent) / "inbox") / chain.name).touch()


def ensure(jobs: Path) -> bool:
    """Start a keeper unless one runs; whether it did. It survives this process and its terminal."""
    folder = place(jobs)
    if is_held(folder / "lock"):
        return False
    _started[:] = [one for one in _started if one.poll() is None]
    code, log = _code(jobs), folder / "log.txt"
    started = detached.start("toolkit.launch.keeper", jobs, code=code, cwd=folder, log=log)
    _started.append(started)
    return True


def _code(jobs: Path) -> Path:
    """The newest kept code: what is edited in a checkout changes no keeper that runs."""
    kept = sorted((jobs / "code").glob("*/toolkit"), key=lambda path: path.stat().st_mtime)
    return kept[-1].parent if kept else resources.PACKAGE.parent


def environ(jobs: Path) -> tuple[int, dict[str, str]] | None:
    """Process id and variables of the keeper that runs here, as it was started; ``None`` where none does."""
    words = [b"toolkit.launch.keeper", os.fsencode(jobs)]
    for pid in processes():
        with contextlib.suppress(OSError):  # another user's, or gone
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-3:-1] == words:
                given = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
                return pid, dict(one.split("=", 1) for one in given if "=" in one)
    return None
