"""Values of secrets by reference: looked up where a job starts, never written down."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from toolkit.errors import BackendError, UsageError
from toolkit.launch import keeper_process


def values(secrets: Mapping[str, str]) -> dict[str, str]:
    """Variable -> value, for references ``env:NAME`` and ``file:/path``.

    Raises:
        BackendError: A variable is not set, a file is not there, or a reference is of another kind.
    """
    return {name: _value(name, reference) for name, reference in secrets.items()}


def check(secrets: Mapping[str, str], jobs: Path) -> None:
    """Refuse a submission to this machine whose jobs would not get the values that this shell has.

    The keeper starts jobs, perhaps one that was started long ago from another shell, and no value is written down
    for it: what it was started with is all that it has.

    Args:
        secrets: Of the profile.
        jobs: The workspace's ``jobs`` folder.

    Raises:
        UsageError: A variable is not set here, or the keeper that runs lacks it or has another value.
    """
    references = (one.partition(":") for one in secrets.values())
    wanted = [place for kind, _, place in references if kind == "env"]
    for name in wanted:
        if name not in os.environ:
            raise UsageError(
                f"the profile's secrets want {name}, which is not set here",
                f"export {name}=..., or name a file in the profile: file:/path",
            )
    pid, theirs = (keeper_process.environ(jobs) if wanted else None) or (None, os.environ)
    for name in wanted:
        if theirs.get(name) != os.environ[name]:
            has = "another value of" if name in theirs else "no"
            raise UsageError(
                f"what starts jobs in this workspace (process {pid}) has {has} {name}, "
                "and would not use this shell's",
                f"name a file in the profile: file:/path; or `kill {pid}`, which ends no job, "
                "and submit again: this shell's variables count then",
            )


def _value(name: str, reference: str) -> str:
    kind, _, place = reference.partition(":")
    if kind == "env":
        if place in os.environ:
            return os.environ[place]
        raise BackendError(
            f"secret {name}: {place} is not set where jobs are started",
            "jobs that wait are started by a process of their own: name a file, file:/path",
        )
    if kind == "file":
        try:
            return Path(place).expanduser().read_text().strip()
        except OSError as error:
            raise BackendError(f"secret {name}: {place}: {error.strerror}") from error
    raise BackendError(f"secret {name}: {reference!r} is neither env:NAME nor file:/path")
