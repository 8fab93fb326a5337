"""Paths that a recipe names."""

from __future__ import annotations

from pathlib import Path


def resolve_path(text: str, directory: Path) -> Path:
    """A path of a recipe on this machine: ``~`` is the home folder, relative ones start at the recipe."""
    return directory / Path(text).expanduser()


def file_of(reference: str) -> str:
    """The file of ``file.py:function``."""
    return reference.rpartition(":")[0]
