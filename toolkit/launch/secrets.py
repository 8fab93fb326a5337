"""Values of secrets by reference: looked up where a job starts, never written down."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from toolkit.errors import BackendError


def values(secrets: Mapping[str, str]) -> dict[str, str]:
    """Variable -> value, for references ``env:NAME`` and ``file:/path``.

    Raises:
        BackendError: A variable is not set, a file is not there, or a reference is of another kind.
    """
    return {name: _value(name, reference) for name, reference in secrets.items()}


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
