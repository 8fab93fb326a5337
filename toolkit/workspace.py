"""Where things lie: one workspace folder per project, one cache folder per user. Both are for their owner alone (0700).

::

    <workspace>/                    ./runs unless --workspace or TOOLKIT_WORKSPACE says otherwise
    ├── artifacts/<stage>/<fingerprint>/     complete or absent; manifest.json inside
    ├── state/<stage>/<fingerprint>/         step.json, log, checkpoints: what outlives a crash
    ├── mlflow.db, mlartifacts/              the default MLflow store
    ├── keys.json                            API keys of the served models, hashed (0600)
    ├── jobs/                                what was submitted (launch/folder.py)
    ├── sweeps/                              trials of recipes (sweep/folder.py)
    └── servers/                             detached servers
    <cache>/                        $TOOLKIT_CACHE, $XDG_CACHE_HOME/toolkit or ~/.cache/toolkit
    ├── environments/<name>-<digest>/        built from lock files
    ├── compiled/<name>-<digest>/            what stages and engines compile, by environment
    ├── matmul-peaks/                        how fast GPUs multiply (train/watch/peak.py)
    ├── guards/                              engines that run (engines/orphans.py)
    └── digests.db                           sha256 of files that did not change
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

FINGERPRINT_SHOWN = 16
"""Hex digits of a fingerprint that name a folder."""


@dataclass(frozen=True)
class Workspace:
    """Paths of one workspace; nothing is made until it is needed."""

    root: Path

    @classmethod
    def locate(cls, given: Path | None = None) -> Workspace:
        """The workspace that ``--workspace``, ``TOOLKIT_WORKSPACE`` or the working directory names, absolute."""
        return cls((given or Path(os.environ.get("TOOLKIT_WORKSPACE", "runs"))).absolute())

    def artifact(self, stage: str, fingerprint: str) -> Path:
        """Folder of a finished artifact."""
        return self.root / "artifacts" / stage / fingerprint[:FINGERPRINT_SHOWN]

    def state(self, stage: str, fingerprint: str) -> Path:
        """Folder of a step's crash-proof state."""
        return self.root / "state" / stage / fingerprint[:FINGERPRINT_SHOWN]

    @property
    def mlflow_uri(self) -> str:
        """Tracking URI of the workspace's own store."""
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """Artifact root of the workspace's own store."""
        return self.root / "mlartifacts"

    @property
    def servers(self) -> Path:
        """Records of detached servers."""
        return self.root / "servers"

    @property
    def jobs(self) -> Path:
        """Chains of jobs."""
        return self.root / "jobs"

    @property
    def sweeps(self) -> Path:
        """Sweeps over values of recipes."""
        return self.root / "sweeps"

    @property
    def keys(self) -> Path:
        """API keys of the served models, hashed; see ``toolkit keys``."""
        return self.root / "keys.json"


def cache_root() -> Path:
    """The per-user cache folder."""
    if given := os.environ.get("TOOLKIT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "toolkit"


def private_folder(path: Path) -> Path:
    """Make ``path`` and its parents, readable by the owner alone where they are new; return it."""
    previous = os.umask(0o077)
    try:
        path.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(previous)
    return path
