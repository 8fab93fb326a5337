"""Finds the files that ship with the toolkit: recipes, job profiles and templates, lock files.

In an installed wheel ``recipes/`` and ``jobs/`` lie in ``toolkit/_data``; in a checkout they lie
beside the package.
"""

from __future__ import annotations

from pathlib import Path

from toolkit.errors import NotInstalledError

PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """Folder ``recipes`` or ``jobs`` (or a path below one), in the wheel or the checkout.

    Raises:
        NotInstalledError: Neither place has it, so the installation is damaged.
    """
    places = (PACKAGE / "_data" / name, PACKAGE.parent / name)
    for place in places:
        if place.exists():
            return place
    raise NotInstalledError(
        f"the toolkit's own files {name!r} are in neither {places[0]} nor {places[1]}",
        "the installation is damaged: pip install --force-reinstall toolkit",
    )


def recipes() -> dict[str, Path]:
    """Shipped recipes by name, such as ``demo/tickets``: their path below ``recipes/``, no suffix."""
    root = shipped("recipes")
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.yaml"))
    }


def profiles() -> Path:
    """Folder of the shipped profiles."""
    return shipped("jobs/profiles")


def locks() -> Path:
    """Folder of the lock files; part of the package itself."""
    return PACKAGE / "environments" / "locks"
