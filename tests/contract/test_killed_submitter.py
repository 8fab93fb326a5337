"""The real ``toolkit run --on ... --detach``, killed (SIGKILL) while it submits, and the same command again."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.contract.submitter import Submitter
from tests.contract.world import World
from tests.slurm.cluster import SlurmCluster, missing
from toolkit.launch.folder import JobFolder
from toolkit.tracking.client import connect
from toolkit.tracking.store import resolve
from toolkit.workspace import Workspace

pytestmark = pytest.mark.integration

AT = {
    "part": lambda jobs, name: any(jobs.glob(f".{name}-*")),
    "written": lambda jobs, name: any(jobs.glob(f"{name}-*/chain.json")),
    "run": lambda jobs, name: any((jobs.parent / "tracking").glob(f"{name}-*/mlflow.json")),
    "parent": lambda jobs, name: any(jobs.glob(f"{name}-*/parent.json")),
    "given": lambda jobs, name: any(jobs.glob(f"{name}-*/*/submitted.json")),
}
"""What the submission has left on disk when it is killed, in the order in which it comes."""


def kill_at(process, reached) -> bool:
    """Kill it as soon as it has come so far; whether it had not ended by itself."""
    end = time.monotonic() + 300
    while process.poll() is None and not reached():
        assert time.monotonic() < end
        time.sleep(0.0005)
    lived = process.poll() is None
    process.kill()
    process.communicate()
    return lived


def runs(submitter: Submitter) -> dict[str, int]:
    """How many MLflow runs have which key."""
    client = connect(resolve(None, Workspace(submitter.folder / "runs")))
    found: dict[str, int] = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            key = run.data.tags.get("toolkit.key", "")
            found[key] = found.get(key, 0) + 1
    return found


def test_9_wherever_a_submission_is_killed_the_same_command_makes_one_chain_of_it(tmp_path):
    places = {"slots": 2, "folder": str(tmp_path / "places")}
    submitter = Submitter(tmp_path / "p", "local", places)
    try:
        cut, chains = [], []
        for point, reached in AT.items():
            process = submitter.start(point)
            if kill_at(process, lambda r=reached, p=point: r(submitter.jobs, p)):
                cut.append(point)
            chains.append(submitter.again(point))
        assert len(cut) >= len(AT) - 1  # the last point may come after its end
        assert submitter.chains() == sorted(chains)
        submitter.go()
        submitter.wait_until_over(chains)
        ids = sorted(one.name for chain in chains for one in submitter.jobs.glob(f"{chain}/*-0?-*"))
        assert len(ids) == 2 * len(chains)
        assert submitter.ran() == ids
        assert all(len(JobFolder(path).attempts) == 1 for path in submitter.jobs.glob("*/*-0?-*"))
        assert [path.name for path in submitter.jobs.glob(".*.part")] == []
        assert len(World(submitter.folder).keepers()) == 1
        counted = runs(submitter)
        assert {chain: counted.get(chain) for chain in chains} == dict.fromkeys(chains, 1)
    finally:
        submitter.close()
    assert submitter.processes() == []


SBATCH = """#!/bin/sh
# Slurm takes the job, and whoever submitted it is gone before it knows.
out="$({sbatch} "$@")" || exit
mkdir {flag} 2>/dev/null && kill -9 $PPID
echo "$out"
"""


def test_9_a_submitter_killed_between_sbatch_and_its_answer_leaves_one_job(tmp_path, request):
    if reason := missing():
        pytest.skip(reason)
    cluster = SlurmCluster()
    request.addfinalizer(cluster.stop)
    found = pytest.MonkeyPatch()
    request.addfinalizer(found.undo)
    for name, value in cluster.start().environ.items():
        found.setenv(name, value)
    folder = tmp_path / "bin"
    folder.mkdir()
    text = SBATCH.replace("{sbatch}", str(shutil.which("sbatch")))
    (folder / "sbatch").write_text(text.replace("{flag}", str(tmp_path / "killed")))
    (folder / "sbatch").chmod(0o755)
    found.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    submitter = Submitter(tmp_path / "p", "slurm", {})
    try:
        first = submitter.start("cut")
        first.communicate(timeout=300)
        assert first.returncode == -signal.SIGKILL
        assert not any(submitter.jobs.glob("cut-*/*/submitted.json"))
        waiting = cluster.ask("squeue", "-h", "-o", "%j").split()
        assert len(waiting) == 1
        chain = submitter.again("cut")
        assert submitter.chains() == [chain]
        names = sorted(path.name for path in submitter.jobs.glob(f"{chain}/*-0?-*"))
        assert sorted(cluster.ask("squeue", "-h", "-o", "%j").split()) == names
        submitter.go()
        submitter.wait_until_over([chain])
        assert submitter.ran() == names
    finally:
        submitter.close()
    assert Path(tmp_path / "killed").is_dir()
