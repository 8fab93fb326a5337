"""``toolkit env`` and ``toolkit doctor`` as a user types them."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.cli import main
from toolkit.environments import lock_names
from toolkit.errors import NotInstalledError

HOST = f"""
name: host
accelerator: cpu
environments:
  train: {{ python: {sys.executable} }}
  quantize: {{ python: {sys.executable} }}
  vllm: {{ python: {sys.executable}, variables: {{ GREETING: hello }} }}
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def place(monkeypatch, tmp_path):
    """An empty folder to work in, with an empty cache."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host.yaml").write_text(HOST)


@pytest.fixture
def toolkit(place, monkeypatch, capfd):
    """Runs the command in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["toolkit", *arguments])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def toolkit_process(place):
    """Runs the command in a process of its own, for what replaces the process."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "toolkit", *arguments],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


def checks(done):
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_list_shows_every_lock_of_a_stage(toolkit, tmp_path):
    rows = json.loads(toolkit("env", "list", "--json").stdout)
    assert [row["lock"] for row in rows] == [n for n in lock_names() if n not in ("core", "dev")]
    row = next(row for row in rows if row["lock"] == "train-cpu")
    assert (row["accelerator"], row["python"], row["ready"], row["size"]) == (
        "cpu",
        "3.11",
        False,
        None,
    )
    assert row["path"].startswith(str(tmp_path / "cache" / "environments" / "train-cpu-"))
    assert "sglang-cuda" in toolkit("env", "list").stdout


def test_sync_has_nothing_to_build_where_a_profile_gives_the_interpreter(toolkit):
    done = toolkit("env", "sync", "train", "--profile", "./host.yaml")
    assert done.returncode == 0, done.stderr
    assert f"nothing to build: it runs in {sys.executable}" in done.stderr


def test_sync_refuses_a_name_that_is_none(toolkit):
    done = toolkit("env", "sync", "trian")
    assert done.returncode == 2
    assert "no environment is named 'trian' (did you mean 'train'?)" in done.stderr
    assert "vllm-cuda" in done.stderr


def test_run_runs_in_the_environment(toolkit_process):
    script = "import os, sys; print(os.environ['GREETING'], sys.argv[1:])"
    done = toolkit_process(
        "env", "run", "vllm", "--on", "./host.yaml", "--", "python", "-c", script, "-x", "--y"
    )
    assert done.stdout == "hello ['-x', '--y']\n", done.stderr


def test_run_hands_on_the_exit_code(toolkit_process):
    done = toolkit_process("env", "run", "core", "--", "python", "-c", "import sys; sys.exit(7)")
    assert done.returncode == 7


def test_run_names_what_is_not_built(toolkit):
    done = toolkit("env", "run", "train-cpu", "--", "python")
    assert done.returncode == 3
    assert "environment 'train-cpu' (lock train-cpu) is not built" in done.stderr
    assert "toolkit env sync train-cpu" in done.stderr


def test_run_names_a_program_that_is_not_there(toolkit):
    done = toolkit("env", "run", "core", "no-such-program")
    assert done.returncode == 3
    assert "environment 'core' has no program 'no-such-program'" in done.stderr


def test_doctor_is_content_where_all_that_is_needed_is_there(toolkit):
    done = toolkit("doctor", "--profile", "./host.yaml", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["usable"] is True
    assert checks(done)["environment vllm"]["found"] == sys.executable
    assert {"python", "uv", "machine", "gpu", "disk", "workspace", "mlflow store"} <= set(
        checks(done)
    )


def test_doctor_exits_with_3_and_names_the_commands_where_something_is_missing(toolkit):
    done = toolkit("doctor", "--profile", "local-cpu")
    assert done.returncode == 3
    for name in ("train", "quantize", "vllm"):
        assert f"environment {name}: toolkit env sync {name}\n" in done.stdout


def test_doctor_wants_uv_only_where_something_is_to_be_built(toolkit, monkeypatch):
    def absent():
        raise NotInstalledError("the program uv is not installed", "pip install uv")

    monkeypatch.setattr("toolkit.doctor.uv", absent)
    assert (
        checks(toolkit("doctor", "--profile", "./host.yaml", "--json"))["uv"]["verdict"] == "note"
    )
    built = toolkit("doctor", "--profile", "local-cpu", "--json")
    assert checks(built)["uv"]["verdict"] == "missing"


def test_doctor_notes_a_setting_that_makes_every_step_slow(toolkit, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    assert "bytecode" not in checks(toolkit("doctor", "--profile", "./host.yaml", "--json"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    done = toolkit("doctor", "--profile", "./host.yaml", "--json")
    assert done.returncode == 0
    assert checks(done)["bytecode"]["mend"] == "unset PYTHONDONTWRITEBYTECODE"


def test_doctor_names_an_mlflow_server_that_does_not_answer(toolkit, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = toolkit("doctor", "--profile", "./host.yaml", "--json")
    assert done.returncode == 3
    store = checks(done)["mlflow store"]
    assert store["verdict"] == "missing"
    assert store["found"].startswith("http://127.0.0.1:9 does not answer: ")


def test_doctor_names_a_workspace_that_cannot_be(toolkit, tmp_path):
    (tmp_path / "file").touch()
    done = toolkit("doctor", "--profile", "./host.yaml", "--workspace", "/proc/here", "--json")
    assert done.returncode == 3
    assert checks(done)["workspace"]["found"].startswith("/proc/here cannot be written: ")


def test_doctor_names_an_unfinished_build(toolkit, tmp_path):
    part = tmp_path / "cache" / "environments" / "train-cpu-0123456789ab.part"
    part.mkdir(parents=True)
    done = toolkit("doctor", "--profile", "./host.yaml", "--json")
    assert done.returncode == 0
    leftover = checks(done)["unfinished build"]
    assert (leftover["verdict"], leftover["found"]) == ("note", str(part))
    assert leftover["mend"].startswith("toolkit env sync train-cpu")
