"""``toolkit jobs`` and ``run --on``: what is refused, and what is said where nothing is there."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from tests.contract.world import World
from tests.unit.test_jobs import attempt
from toolkit.cli import toolkit
from toolkit.cli.submitting import run_on
from toolkit.errors import UsageError


@pytest.fixture
def run(tmp_path):
    def call(*arguments):
        return CliRunner().invoke(toolkit, [*arguments, "--workspace", str(tmp_path / "runs")])

    return call


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--detach",), "--detach is for jobs", "add --on NAME, such as --on local --detach"),
        (("--dry-run",), "--dry-run is for jobs", "add --on NAME, such as --on local --dry-run"),
        (
            ("--on", "local", "--profile", "local"),
            "--on and --profile are both given",
            "--on NAME submits jobs, --profile runs here",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(run, options, message, hint):
    result = run("run", "a.yaml", *options)
    assert isinstance(result.exception, UsageError)
    assert (result.exception.message, result.exception.hint) == (message, hint)


def test_no_jobs_says_how_to_get_some(run):
    assert "toolkit run RECIPE --on PROFILE submits some" in run("jobs", "list").output
    assert json.loads(run("jobs", "list", "--json").output) == []
    assert json.loads(run("jobs", "top", "--json").output) == {
        "gpu_hours": 0,
        "steps": [],
        "jobs": [],
    }


def test_an_unknown_name_is_refused(run):
    result = run("jobs", "show", "nothing")
    assert isinstance(result.exception, UsageError)
    assert result.exception.message.startswith("no chain and no job is named 'nothing' in /")
    assert "--workspace" in result.exception.hint


def test_the_newest_chain_comes_first_and_its_jobs_in_their_order(run, tmp_path):
    world = World(tmp_path, "slurm")  # which needs no keeper
    chains = [world.write(["true"], ["true"], name=name) for name in ("old", "new")]
    lines = run("jobs", "list", "--workspace", str(world.jobs.parent)).output.splitlines()
    shown = [line.split()[:2] for line in lines if "-step" in line]
    order = [(chains[1], 1), (chains[1], 2), (chains[0], 1), (chains[0], 2)]
    assert shown == [[f"{chain}-{n:02d}-step", "queued"] for chain, n in order]
    assert sum("repeat the submission" in line for line in lines) == 2  # nobody submitted them


def test_ctrl_c_while_it_is_submitted_says_that_the_same_command_goes_on(monkeypatch, capsys):
    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("toolkit.launch.submit.submit", cut_off)
    todo = [SimpleNamespace(done=False)]
    with pytest.raises(KeyboardInterrupt):
        run_on(None, todo, None, detach=True, dry_run=False, as_json=False)
    assert "the same command goes on with it" in capsys.readouterr().err


@pytest.fixture
def ended(tmp_path):
    """A chain that failed in its first step, of two."""
    world = World(tmp_path)
    chain = world.write(["true"], ["true"])
    made = attempt(world.job(chain), "failed", exit_code=3)
    made.log().write_text("one\ntwo\n")
    (world.jobs / chain / "settled.json").write_text('{"status": "FAILED"}')
    return chain


def test_a_failed_chain_is_listed_shown_and_waited_for(run, ended):
    listed = json.loads(run("jobs", "list", "--json").output)
    assert [one["state"] for one in listed] == ["failed", "cancelled"]
    text = run("jobs", "show", ended).output
    assert f"{ended}-01-step  failed: it broke" in text
    assert "try 1 on n1, GPU 3: failed: it broke" in text
    assert "cancelled: step-1 failed: it broke" in text
    waited = run("jobs", "wait", ended)
    assert waited.exit_code == 3
    assert run("jobs", "logs", f"{ended}-01-step").output == "one\ntwo\n"
    line = json.loads(run("jobs", "logs", ended, "--json").output.splitlines()[0])
    assert line == {"job": f"{ended}-01-step", "attempt": 1, "node": 0, "text": "one"}


def test_cancelling_what_is_over_changes_nothing(run, ended):
    result = run("jobs", "cancel", ended, "--json")
    assert [one["state"] for one in json.loads(result.output)] == ["failed", "cancelled"]
