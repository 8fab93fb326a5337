"""What is said about a run besides its numbers: flat parameters, the code's git state, datasets."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARAM_LIMIT = 6000
"""Longest parameter value MLflow takes, in characters."""

DIFF_LIMIT = 1024 * 1024
"""Bytes of a git diff that are kept."""

GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Dataset:
    """A dataset that a step read or made.

    Attributes:
        name: What people call it, e.g. the recipe's name.
        digest: Content hash; MLflow keeps its first 36 characters.
        source: Where it lies: a path or an URL.
        context: What it was used for: ``training``, ``evaluation``, ``calibration``, ...
        profile: Counts worth seeing beside it, e.g. ``{"rows": 800}``.
    """

    name: str
    digest: str
    source: str
    context: str
    profile: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class GitState:
    """Commit and uncommitted changes of a folder's repository."""

    commit: str
    diff: str

    @property
    def tags(self) -> dict[str, str]:
        """MLflow's own tag for the commit, and whether there is more than the commit."""
        return {
            "mlflow.source.git.commit": self.commit,
            "toolkit.git.dirty": str(bool(self.diff)).lower(),
        }


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted parameters: ``{"lora": {"rank": 8}}`` -> ``{"lora.rank": "8"}``.

    Lists of plain values and empty containers stay one parameter, as JSON; a list that holds
    mappings is numbered. Values beyond MLflow's limit are cut, with a note: the whole config is
    an artifact of the run.
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        elif _holds_mappings(value):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{path}.")
        else:
            flat[path] = _cut(value if isinstance(value, str) else json.dumps(value, default=str))
    return flat


def _holds_mappings(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and any(isinstance(item, Mapping) for item in value)


def _cut(text: str) -> str:
    note = " ... (whole value: config.json)"
    return text if len(text) <= PARAM_LIMIT else text[: PARAM_LIMIT - len(note)] + note


def git_state(folder: Path) -> GitState | None:
    """Commit and diff (at most 1 MiB) of the repository around ``folder``, if there is one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _git(folder, "diff", "--no-color", "--no-ext-diff", "HEAD") or ""
    if len(diff) > DIFF_LIMIT:
        diff = diff[:DIFF_LIMIT] + f"\n... cut: {len(diff)} characters in all\n"
    return GitState(commit.strip(), diff)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # no git, no repository, or a disk too slow to wait for
        return None
    return done.stdout.decode(errors="replace")
