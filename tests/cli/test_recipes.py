"""``toolkit init``, ``recipes``, ``validate``, ``schema`` and ``plan`` as a user types them; nothing is run."""

import json
import sys

import pytest

from toolkit.cli import main
from toolkit.errors import Interrupted


@pytest.fixture
def toolkit(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOOLKIT_WORKSPACE", raising=False)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["toolkit", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def test_init_writes_a_recipe_that_plans(toolkit, tmp_path):
    assert toolkit("init", "first.yaml")[0] == 0
    assert (tmp_path / "tickets.py").is_file()
    code, out, _ = toolkit("plan", "first.yaml", "--on", "local-cpu", "--json")
    plan = json.loads(out)
    assert code == 0
    assert [step["state"] for step in plan["steps"]] == ["run"] * len(plan["steps"])
    assert plan["steps"][0]["name"] == "fetch"
    assert plan["warnings"] == []


def test_init_overwrites_nothing(toolkit, tmp_path):
    (tmp_path / "tickets.py").write_text("mine")
    code, _, err = toolkit("init", "first.yaml")
    assert code == 2
    assert err == (
        "error: already there: tickets.py; nothing was written\n"
        " hint: choose another path, or remove it\n"
    )
    assert not (tmp_path / "first.yaml").exists()


def test_plan_gives_its_warnings_to_scripts(toolkit):
    toolkit("init", "first.yaml", "--from", "demo/tickets-qlora")
    tuned = ("--set", "serve.models=[tuned]", "--on", "local-cpu")
    _, out, _ = toolkit("plan", "first.yaml", *tuned, "--json")
    _, _, err = toolkit("plan", "first.yaml", *tuned)
    warnings = json.loads(out)["warnings"]
    assert warnings
    assert err == "".join(f"warning: {text}\n" for text in warnings)


def test_a_misspelt_recipe_name_gets_the_nearest(toolkit):
    code, _, err = toolkit("init", "x.yaml", "--from", "demo/ticket")
    assert code == 2
    assert "no shipped recipe is named 'demo/ticket' (did you mean 'demo/tickets'?)" in err


def test_validate_refuses_a_folder_without_recipes(toolkit, tmp_path):
    code, _, err = toolkit("validate", str(tmp_path))
    assert code == 2
    assert err == (
        f"error: no .yaml file is in {tmp_path}\n hint: name a recipe, or a folder that has some\n"
    )


def test_validate_gives_mistakes_as_json(toolkit, tmp_path):
    toolkit("init", "first.yaml")
    code, out, _ = toolkit("validate", "first.yaml", "--set", "train.lr=1", "--json")
    assert code == 2
    assert json.loads(out) == [
        {
            "where": "--set train.lr=1",
            "path": "train.lr",
            "message": "is not a key here (did you mean 'learning_rate'?)",
        }
    ]


def test_a_stage_names_the_environments_that_it_lacks(toolkit):
    toolkit("init", "first.yaml")
    code, _, err = toolkit("train", "first.yaml", "--on", "local-cpu")
    assert code == 3
    assert err == "error: not built: environment train\n hint: toolkit env sync train\n"


def test_a_stage_names_what_a_profile_promised_and_is_not_there(toolkit, tmp_path):
    toolkit("init", "first.yaml")
    (tmp_path / "host.yaml").write_text(
        f"name: host\nenvironments: {{train: {{python: {sys.executable}, pythonpath: [./site]}}}}\n"
    )
    code, _, err = toolkit("train", "first.yaml", "--on", "./host.yaml")
    assert code == 3
    assert err == (
        f"error: environment 'train': the profile names {tmp_path / 'site'}, which is not there\n"
        " hint: mend environments.train in the profile\n"
    )
    _, out, _ = toolkit("plan", "first.yaml", "--on", "./host.yaml")
    assert "train (not there)" in out


def test_plan_says_that_it_cannot_tell_the_memory_yet(toolkit, tmp_path):
    toolkit("init", "first.yaml")
    (tmp_path / "gpu.yaml").write_text(
        "name: gpu\naccelerator: cuda\ngpu: {memory_gib: 10, capability: 9.0, count: 1}\n"
    )
    _, out, _ = toolkit("plan", "first.yaml", "--on", "./gpu.yaml")
    assert "no forecast of memory yet: the base is not fetched" in out
    _, out, _ = toolkit("plan", "first.yaml", "--on", "./gpu.yaml", "--json")
    assert json.loads(out)["memory_unknown"].startswith("no forecast of memory yet")
    _, out, _ = toolkit("plan", "first.yaml", "--on", "local-cpu")
    assert "no forecast" not in out


@pytest.mark.parametrize(("stop", "expected"), [(KeyboardInterrupt, 130), (Interrupted, 143)])
def test_who_stops_a_run_reads_that_nothing_is_lost(toolkit, monkeypatch, stop, expected):
    def stopped(*_, **__):
        raise stop

    monkeypatch.setattr("toolkit.execute.run_plan", stopped)
    monkeypatch.setattr("toolkit.prepare.Prepared.require_environments", lambda *_: None)
    monkeypatch.setattr("toolkit.worker.raise_on_sigterm", lambda: None)
    toolkit("init", "first.yaml")
    code, _, err = toolkit("train", "first.yaml", "--profile", "local-cpu")
    assert code == expected
    assert "checkpoints are kept; run the same command again and it goes on" in err


def test_only_names_what_is_not_done(toolkit):
    toolkit("init", "first.yaml")
    code, _, err = toolkit("train", "first.yaml", "--on", "local-cpu", "--only")
    assert code == 2
    assert err == (
        "error: --only, but fetch, data must be made first (new)\n"
        " hint: leave out --only, and they are\n"
    )


def test_plan_shows_every_verdict_to_scripts_even_when_it_refuses(toolkit):
    toolkit("init", "first.yaml")
    open_ = ("--set", "serve.host=0.0.0.0", "--on", "local-cpu")
    code, out, err = toolkit("plan", "first.yaml", *open_, "--json")
    verdicts = {v["rule"]: v for v in json.loads(out)["preflight"] if v["outcome"] == "refuse"}
    assert code == 2
    assert "toolkit keys create" in verdicts["serve.loopback"]["hint"]
    assert verdicts["serve.loopback"]["source"].startswith("vLLM's --api-key guards /v1")
    assert set(verdicts["serve.loopback"]) == {"rule", "outcome", "message", "hint", "source"}
    assert "[serve.loopback]" in err


def test_validate_says_what_no_machine_can_serve(toolkit):
    toolkit("init", "first.yaml")
    code, out, err = toolkit("validate", "first.yaml", "--set", "serve.host=0.0.0.0", "--json")
    (refused,) = [v for v in json.loads(out) if v.get("outcome") == "refuse"]
    assert code == 2
    assert refused["rule"] == "serve.loopback"
    assert refused["where"] == "first.yaml"
    assert "first.yaml: serve.host is '0.0.0.0'" in err


def test_a_wrong_window_of_steps_is_refused_before_anything_runs(toolkit, tmp_path):
    toolkit("init", "first.yaml")
    code, _, err = toolkit("train", "first.yaml", "--profile-steps", "13:10")
    assert code == 2
    assert err == (
        "error: --profile-steps is 13:10: its first step comes after its last\n"
        " hint: write --profile-steps 10:13\n"
    )
    short = ("--on", "local-cpu", "--set", "train.max_steps=8")
    code, _, err = toolkit("run", "first.yaml", *short, "--profile-steps", "10:13")
    assert code == 2
    assert "--profile-steps is 10:13, but train.max_steps is 8" in err
    assert "hint: write --profile-steps 5:8, or train longer" in err
    assert not (tmp_path / "runs").exists()


def test_a_probe_records_nothing(toolkit):
    toolkit("init", "first.yaml")
    code, _, err = toolkit("train", "first.yaml", "--probe", "--profile-steps", "1:2")
    assert code == 2
    assert "--probe keeps nothing, and --profile-steps would have nowhere to write" in err


def test_a_window_is_no_part_of_a_fingerprint(tmp_path):
    """Neither the recipe nor a stage's config has a place for it: only the step file does."""
    from toolkit.stages import CONFIGS
    from toolkit.worker import StepSpec

    assert "profile_steps" in StepSpec.__dataclass_fields__
    assert "profile_steps" not in CONFIGS["train"].model_fields
