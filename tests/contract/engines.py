"""Engines that the contract is tested on. A backend's helper adds a function here, and to ENGINES.

Each takes an empty folder and pytest's request, and returns a :class:`World`; it calls ``pytest.skip`` with the
reason where the engine is not on this machine. What it starts, it ends with ``request.addfinalizer``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.world import World


def local(folder: Path, request: pytest.FixtureRequest) -> World:
    """This machine, with places of its own: two GPUs that are only numbers, and two slots."""
    places = {"gpus": [0, 1], "slots": 2, "folder": str(folder / "places")}
    return World(folder, "local", places)


ENGINES = {"local": local}
