"""Engines that the contract is tested on. A backend's helper adds a function here, and to ENGINES.

Each takes an empty folder and pytest's request, and returns a :class:`World`; it calls ``pytest.skip`` with the
reason where the engine is not on this machine. What it starts, it ends with ``request.addfinalizer``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.world import World
from tests.slurm.cluster import SlurmCluster, missing
from toolkit.errors import NotInstalledError


def local(folder: Path, request: pytest.FixtureRequest) -> World:
    """This machine, with places of its own: two GPUs that are only numbers, and two slots."""
    places = {"gpus": [0, 1], "slots": 2, "folder": str(folder / "places")}
    return World(folder, "local", places)


def slurm(folder: Path, request: pytest.FixtureRequest) -> World:
    """A real Slurm of Debian's packages on this machine: two nodes, two GPUs each."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = SlurmCluster()
    request.addfinalizer(cluster.stop)
    found = pytest.MonkeyPatch()
    request.addfinalizer(found.undo)
    for name, value in cluster.start().environ.items():
        found.setenv(name, value)
    return World(folder, "slurm", {})


def kubernetes(folder: Path, request: pytest.FixtureRequest) -> World:
    """A small API server over HTTP whose containers are processes here; no cluster can be raised in CI."""
    from tests.fake_kubernetes import Cluster

    cluster = Cluster(folder / "cluster")
    cluster.__enter__()
    request.addfinalizer(lambda: cluster.__exit__(None, None, None))
    volumes = [{"path": str(Path(folder.anchor) / folder.parts[1]), "claim": "team"}]
    section = {"kubeconfig": str(cluster.kubeconfig()), "image": "toolkit", "volumes": volumes}
    world = World(folder, "kubernetes", section)
    world.cluster = cluster
    return world


def ray(folder: Path, request: pytest.FixtureRequest) -> World:
    """A real Ray with four cores and four GPUs that are only numbers."""
    from tests.ray_cluster import RayCluster, ray_python

    try:
        python = ray_python()
    except NotInstalledError as error:
        pytest.skip(str(error))
    cluster = RayCluster(python)
    request.addfinalizer(lambda: cluster.__exit__(None, None, None))
    cluster.__enter__()
    world = World(
        folder, "ray", {"address": cluster.address, "token": f"file:{cluster.token_file}"}
    )
    world.cluster = cluster
    return world


ENGINES = {"local": local, "slurm": slurm, "kubernetes": kubernetes, "ray": ray}
