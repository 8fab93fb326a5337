"""The built wheel, installed into an empty environment with the core's lock and nothing of the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from toolkit.environments.uv import uv, uv_environ

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "toolkit" / "environments" / "locks"
RECIPE = "demo/tickets"


def run(*command, **options):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    constraints = ["--build-constraints", str(LOCKS / "dev.txt")]
    run(
        uv(),
        "build",
        "--wheel",
        *constraints,
        "--python",
        sys.executable,
        "--out-dir",
        str(out),
        cwd=ROOT,
        env=uv_environ(),
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the installed ``toolkit`` in an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    python = str(folder / "venv" / "bin" / "python")
    run(
        uv(),
        "venv",
        "--quiet",
        "--no-project",
        "--python",
        sys.executable,
        str(folder / "venv"),
        env=uv_environ(),
    )
    run(
        uv(),
        "pip",
        "sync",
        "--python",
        python,
        "--require-hashes",
        str(LOCKS / "core.txt"),
        env=uv_environ(),
    )
    run(uv(), "pip", "install", "--python", python, "--no-deps", str(wheel), env=uv_environ())
    work = folder / "work"
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["TOOLKIT_CACHE"] = str(folder / "cache")

    def toolkit(*arguments):
        return run(str(folder / "venv" / "bin" / "toolkit"), *arguments, cwd=work, env=env)

    toolkit.work = work
    return toolkit


def test_the_wheel_holds_recipes_profiles_and_locks_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert f"toolkit/_data/recipes/{RECIPE}.yaml" in names
    assert "toolkit/_data/jobs/profiles/local.yaml" in names
    assert "toolkit/_data/jobs/observability/grafana-dashboard.json" in names
    assert {f"toolkit/environments/locks/{p.name}" for p in LOCKS.iterdir()} <= set(names)
    assert [n for n in names if n.startswith("tests/") or "__pycache__" in n] == []


def test_help(installed):
    assert "Fine-tune an open LLM" in installed("--help")


def test_shipped_recipes_are_found(installed):
    assert RECIPE in {row["name"] for row in json.loads(installed("recipes", "list", "--json"))}


def test_validate_and_plan_a_copy_of_a_shipped_recipe(installed):
    installed("recipes", "copy", RECIPE, "mine.yaml")
    installed("validate", "mine.yaml")
    plan = installed("plan", "mine.yaml", "--profile", "local-cpu")
    assert "train" in plan
    assert "export-merged" in plan


def test_locks_are_found(installed):
    rows = json.loads(installed("env", "list", "--json"))
    assert "train-cpu" in {row["lock"] for row in rows}


def test_dashboard_and_alerts_are_found(installed):
    listed = installed("dashboards", "export", "watch").split()
    assert "watch/alerts.yaml" in listed


def test_nothing_was_written_beside_the_recipe_but_what_was_asked_for(installed):
    assert not [p for p in installed.work.rglob("*") if p.suffix in (".pyc", ".part")]
