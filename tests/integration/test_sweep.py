"""A sweep of a real training on this machine: its driver is killed on the way, and the best trial is marked."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.contract.test_recipe import RECIPE, Project, tiny_base, train_python
from toolkit.launch.locks import is_held
from toolkit.sweep.folder import SweepFolder, sweeps
from toolkit.tracking.client import connect
from toolkit.tracking.store import resolve
from toolkit.workspace import Workspace

pytestmark = pytest.mark.integration

SWEEP = {"over": {"train.learning_rate": [1e-5, 1e-2]}, "metric": "final_loss", "parallel": 2}
PATIENCE_S = 600.0


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    made = Project(folder / "project", tiny_base(folder / "model"), train_python())
    train = RECIPE["train"] | {"max_steps": 4}
    recipe = RECIPE | {"train": train, "sweep": SWEEP}
    (made.folder / "colours.yaml").write_text(yaml.safe_dump(recipe))
    profile = yaml.safe_load((made.folder / "here.yaml").read_text())
    profile["local"]["slots"] = 2
    (made.folder / "here.yaml").write_text(yaml.safe_dump(profile))
    yield made
    for one in sweeps(made.folder / "runs" / "sweeps"):
        made.toolkit("sweeps", "cancel", one.id)
    made.close()


@pytest.fixture(scope="module")
def swept(project) -> SweepFolder:
    """The sweep, its driver killed while the first trial ran, and the recipe edited meanwhile."""
    name = project.toolkit("sweep", "colours.yaml", "--on", "here.yaml", "--detach").strip()
    folder = SweepFolder(project.folder / "runs" / "sweeps" / name)
    _wait(lambda: folder.trials[0].chain, folder)
    os.kill(_driver(folder), signal.SIGKILL)
    _wait(lambda: not is_held(folder.lock), folder)
    kept = (project.folder / "rows.py").read_text()
    (project.folder / "rows.py").write_text("raise RuntimeError('edited while the sweep ran')")
    project.toolkit("sweeps", "list")
    _wait(lambda: folder.result, folder)
    (project.folder / "rows.py").write_text(kept)
    return folder


def test_killed_and_edited_it_ends_with_every_trial_run_once(swept, project):
    assert [one.state for one in swept.trials] == ["succeeded"] * 2, swept.trials
    chains = [path.parent.name for path in project.jobs.glob("*/chain.json")]
    assert sorted(chains) == sorted(str(one.chain) for one in swept.trials)


def test_the_steps_that_trials_share_ran_once(swept, project):
    steps = [path.name.split("-")[-1] for path in project.jobs.glob("*/*-[0-9]*-*")]
    assert sorted(steps) == ["data", "fetch", "train", "train"]


def test_the_best_is_marked_below_one_run(swept, project):
    client = connect(resolve(None, Workspace(project.folder / "runs")))
    experiment = client.get_experiment_by_name("colours").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    parent, trials = runs["colours sweep"], [runs["colours 1"], runs["colours 2"]]
    assert [run.info.status for run in (parent, *trials)] == ["FINISHED"] * 3
    for number, run in enumerate(trials, 1):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["toolkit.trial"] == str(number)
    losses = [run.data.metrics["train.final_loss"] for run in trials]
    assert losses == [one.value for one in swept.trials]
    best = losses.index(min(losses))
    assert [run.data.tags.get("toolkit.best") for run in trials] == [
        "true" if number == best else None for number in (0, 1)
    ]
    assert parent.data.tags["toolkit.best.trial"] == str(best + 1)
    assert parent.data.tags["toolkit.best.run"] == trials[best].info.run_id
    points = client.get_metric_history(parent.info.run_id, "final_loss")
    assert {(point.step, point.value) for point in points} == set(enumerate(losses, 1))
    rates = [float(run.data.params["train.learning_rate"]) for run in trials]
    assert rates == SWEEP["over"]["train.learning_rate"]


def test_the_command_of_the_best_finds_everything_done(swept, project):
    shown = json.loads(project.toolkit("sweeps", "show", "--json"))
    words = shlex.split(shown["best"]["command"])
    assert words[:2] == ["toolkit", "run"]
    plan = project.toolkit("plan", *[word.replace("--on", "--profile") for word in words[2:]])
    assert "3 of 3 steps are done" in plan


def test_the_same_command_again_only_shows_it(swept, project):
    before = swept.result
    shown = project.toolkit("sweep", "colours.yaml", "--on", "here.yaml")
    assert f"{swept.id}: succeeded; 2 of 2 trials are over" in shown
    assert swept.result == before
    assert not (project.folder / "toolkit.lock").exists()


def test_a_sweep_whose_trials_are_all_done_needs_no_jobs(swept, project):
    chains = len(list(project.jobs.glob("*/chain.json")))
    options = ("--set", "sweep.goal=maximize", "--json")
    shown = json.loads(project.toolkit("sweep", "colours.yaml", "--on", "here.yaml", *options))
    assert shown["state"] == "succeeded"
    assert [one["chain"] for one in shown["trials"]] == [None, None]
    assert shown["best"]["number"] != (swept.result or {})["best"]
    assert len(list(project.jobs.glob("*/chain.json"))) == chains


def _driver(folder: SweepFolder) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"toolkit.sweep.driver" in words and str(folder.path).encode() in words:
                return int(entry.name)
    raise AssertionError("no driver")


def _wait(condition, folder: SweepFolder) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        log = (folder.path / "driver.log").read_text()[-3000:]
        assert time.monotonic() < end, f"{folder.trials} {folder.stopped} {log}"
        time.sleep(0.2)
