"""The fast path of training, compiled on a CPU: what the first run compiles, a later one finds in the cache."""

import shutil
import stat
from pathlib import Path

import pytest
import yaml

from tests.contract.test_recipe import Project, tiny_base, train_python

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles for a CPU with g++"),
]

FAST = """
import sys
sys.path.insert(0, {root!r})
from toolkit.train.speed import choose
sys.path.pop(0)
choose._objections = lambda *_: iter(())
"""
"""``sitecustomize.py`` of the training environment: the fast path has no objections, a CPU is no reason."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    made = Project(folder / "project", tiny_base(folder / "model"), train_python())
    site = made.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAST.format(root=str(Path(__file__).parents[2])))
    profile = yaml.safe_load((made.folder / "here.yaml").read_text())
    profile["environments"]["train"]["pythonpath"] = ["site"]
    (made.folder / "here.yaml").write_text(yaml.safe_dump(profile))
    yield made
    made.close()


def test_what_one_training_compiles_the_next_one_finds(project, monkeypatch):
    cache = project.folder / "cache"
    monkeypatch.setenv("TOOLKIT_CACHE", str(cache))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    said, programs = [], []
    for rate in (1e-2, 2e-2):  # the same graphs, another step
        said.append(trained(project, rate))
        (kept,) = (cache / "compiled").iterdir()
        programs.append({path: path.stat().st_mtime_ns for path in kept.rglob("*.so")})
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert f"compiling layers for the first time, kept in {kept / 'inductor'}" in said[0]
    assert " files of earlier runs, kept in " in said[1]
    assert programs[0]
    assert programs[1] == programs[0]


def trained(project: Project, rate: float) -> str:
    sets = ["--set", "train.max_steps=2", "--set", f"train.learning_rate={rate}"]
    return project.run("train", "colours.yaml", "--profile", "here.yaml", *sets).stderr
