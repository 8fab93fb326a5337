"""One real Slurm for all tests of a process."""

import os

import pytest

from tests.slurm.cluster import SlurmCluster, missing


@pytest.fixture(scope="session")
def cluster():
    reason = missing()
    if reason:
        pytest.skip(reason)
    made = SlurmCluster()
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster, found by what the test starts; its queue is empty before and after."""
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_JOB"))]:
        monkeypatch.delenv(name)
    yield cluster
    cluster.empty()
