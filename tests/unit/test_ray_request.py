"""What Ray is sent, compared with files under tests/golden/jobs. UPDATE_GOLDEN=1 writes them anew."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.launch import profiles
from toolkit.launch.folder import JobFolder
from toolkit.launch.ray.backend import Ray
from toolkit.launch.ray.render import entrypoint
from toolkit.launch.spec import JobSpec, Resources

GOLDEN = Path(__file__).parent.parent / "golden" / "jobs"
JOB = JobSpec(
    id="tickets-3fa2c1d4-04-train",
    chain="tickets-3fa2c1d4",
    step="train",
    stage="train",
    folder="/team/runs/jobs/tickets-3fa2c1d4/tickets-3fa2c1d4-04-train",
    after=("tickets-3fa2c1d4-03-data",),
    argv=("/opt/venv/bin/python", "-P", "-m", "toolkit.launch.shim", "/team/runs/jobs/a b/$(HOME)"),
    env={"TOOLKIT_CACHE": "/team/cache", "EMPTY": ""},
    secrets={"HF_TOKEN": "file:/team/my secrets/hf", "WANDB": "env:SITE_KEY"},
    resources=Resources(gpus=2, cpus=16, memory_gib=120),
)
CLUSTER = {"resources": {"accelerator_type:H100": 0.001}, "labels": {"ray.io/market-type": "spot"}}
CASES = {
    "job": (JOB, CLUSTER),
    "lock": (
        replace(JOB, env={"PYTHONPATH": "/team/runs/my jobs/code/3f/:/team/core"}, secrets={}),
        {"runtime_env": "lock"},
    ),
    "plain": (replace(JOB, resources=Resources(), secrets={}, env={}), {}),
}


def text_of(case: str) -> str:
    job, options = CASES[case]
    return Ray(options, Path()).render(job, {})


@pytest.mark.parametrize("case", CASES)
def test_requests_are_the_golden_ones(case):
    text = text_of(case)
    file = GOLDEN / f"ray-{case}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_every_job_takes_a_core_so_that_it_is_not_started_on_the_head():
    assert json.loads(text_of("plain"))["entrypoint_num_cpus"] == 1


def test_where_ray_installs_the_lock_its_python_is_the_jobs():
    plain = profiles.Profile.model_validate({"name": "a", "backend": "ray"})
    lock = profiles.Profile.model_validate(
        {"name": "a", "backend": "ray", "ray": {"runtime_env": "lock"}}
    )
    own = lock.model_copy(update={"python": "/team/python"})
    assert [plain.interpreter, lock.interpreter, own.interpreter] == [
        sys.executable,
        "python",
        "/team/python",
    ]


def test_nothing_of_ours_is_in_the_runtime_environment_where_ray_would_change_it():
    assert json.loads(text_of("job"))["runtime_env"] == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "20"}
    }


def test_a_start_over_has_an_id_of_its_own(tmp_path):
    job = replace(JOB, folder=str(tmp_path))
    ray = Ray({}, tmp_path)
    assert json.loads(ray.render(job, {}))["submission_id"] == JOB.id
    JobFolder(tmp_path).next_attempt()
    again = json.loads(ray.render(job, {}))
    assert again["submission_id"] == f"{JOB.id}-r2"
    assert f"TOOLKIT_START={JOB.id}-r2" in again["entrypoint"]


def test_several_nodes_are_refused():
    job = replace(JOB, resources=Resources(nodes=2))
    with pytest.raises(UsageError, match="wants 2 nodes, and a Ray job starts on one") as no:
        Ray({}, Path()).render(job, {})
    assert "Slurm or Kubernetes" in no.value.hint


@pytest.mark.parametrize("place", ["hf/token", "file:relative", "env:", "env:A B", "vault:x"])
def test_a_secret_that_no_node_can_find_is_refused(place):
    with pytest.raises(UsageError, match="where no node of Ray can find it") as no:
        Ray({}, Path()).render(replace(JOB, secrets={"HF_TOKEN": place}), {})
    assert "file:/path/that/nodes/see" in no.value.hint


def test_secrets_are_read_on_the_node(tmp_path):
    file = tmp_path / "my $(secret)'s"
    file.write_text("va lue$\n")
    secrets = {"A": f"file:{file}", "B": "env:SITE_KEY"}
    job = replace(JOB, argv=("env", "-0"), env={}, secrets=secrets)
    line = entrypoint(job, "id")
    assert "va lue" not in line
    found = shell(line, SITE_KEY="k'ey")
    assert (found["A"], found["B"]) == ("va lue$", "k'ey")


@pytest.mark.parametrize("place", ["file:/not/there", "env:NOT_SET"])
def test_a_secret_that_is_not_there_starts_nothing(place):
    line = entrypoint(replace(JOB, argv=("echo", "started"), secrets={"A": place}), "id")
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert place.partition(":")[2] in done.stderr


def shell(line: str, **env: str) -> dict[str, str]:
    """What a program sees of its variables that is started by Ray's shell."""
    out = subprocess.run(
        ["/bin/sh", "-c", line], env={"PATH": os.environ["PATH"], **env}, capture_output=True, check=True
    ).stdout  # fmt: skip
    pairs = (one.partition("=") for one in out.decode().split("\0") if one)
    return {name: value for name, _, value in pairs}


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)
NASTY = TEXTS | st.sampled_from(
    ["${HOME}", "$(id)", "`id`", "'", '"', "\\", "\n", "-n", "*", "~", "a=b", "!!", ";"]
)


@given(words=st.lists(NASTY, min_size=1), value=NASTY)
def test_arguments_and_variables_arrive_unchanged(words, value):
    printed = replace(JOB, argv=("printf", r"%s\0", *words), env={"A": value}, secrets={})
    line = json.loads(json.dumps(entrypoint(printed, "id")))
    out = subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=True).stdout
    assert out.decode().split("\0")[:-1] == words
    assert shell(entrypoint(replace(printed, argv=("env", "-0")), "id"))["A"] == value


def test_a_program_whose_path_looks_like_a_variable_is_started(tmp_path):
    program = tmp_path / "a=b c"
    program.write_text('#!/bin/sh\nprintf "%s" "$1"\n')
    program.chmod(0o700)
    line = entrypoint(replace(JOB, argv=(str(program), "x y"), secrets={}), "id")
    assert subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=True).stdout == b"x y"


def test_the_shipped_profile_makes_a_request():
    section = profiles.load("ray").ray
    assert json.loads(Ray(section.model_dump(mode="json"), Path()).render(JOB, {}))["entrypoint"]
