"""Batch scripts, compared with files under tests/golden/slurm (UPDATE_GOLDEN=1 writes them anew); words and answers."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from toolkit.errors import BackendError, NotInstalledError, UnknownStateError, UsageError
from toolkit.launch import profiles
from toolkit.launch.slurm import Slurm, client, quoting
from toolkit.launch.slurm.client import Client
from toolkit.launch.slurm.render import script
from toolkit.launch.slurm.section import OURS, SlurmSection
from toolkit.launch.slurm.states import WORDS, state_of
from toolkit.launch.spec import JobSpec, Resources
from toolkit.launch.states import State
from toolkit.resources import shipped

GOLDEN = Path(__file__).parent.parent / "golden" / "slurm"
PLAIN = JobSpec(
    id="tickets-3fa2c1d4-04-train",
    chain="tickets-3fa2c1d4",
    step="train",
    stage="train",
    folder="/home/ada/my work/jobs/tickets-3fa2c1d4/tickets-3fa2c1d4-04-train",
    after=("tickets-3fa2c1d4-03-data",),
    argv=("/opt/tk/bin/python", "-P", "-m", "toolkit.launch.shim", "/home/ada/my work/jobs"),
    env={"NOTE": 'it\'s $5\n"or" more'},
    resources=Resources(gpus=1, cpus=8, memory_gib=64, time_limit_s=90061),
)
AFTER = {"tickets-3fa2c1d4-03-data": "17@tickets-3fa2c1d4-03-data"}
BIG = replace(PLAIN, resources=Resources(gpus=8, cpus=64, nodes=4))
BOX = {"image": "docker://registry.example.com#ml/toolkit:1", "mounts": ["/data:/data:ro"]}
CASES = {
    "plain": (replace(PLAIN, after=()), {}, {}),
    "modules": (
        replace(PLAIN, secrets={"MLFLOW_TRACKING_TOKEN": "file:/home/ada/.token"}),
        {
            "partition": "gpu,long",
            "account": "ml",
            "qos": "high",
            "constraint": "h100&ib",
            "gpu_type": "h100",
            "exclusive": True,
            "modules": ["cuda/13.0", "python/3.12"],
            "setup": ["ulimit -n 65536"],
            "options": ["--mail-type=END,FAIL", '--comment-like=a "b" #c\\', "--overcommit"],
        },
        AFTER,
    ),
    "nodes": (BIG, {"partition": "gpu"}, AFTER),
    "pyxis": (BIG, {"container": {"engine": "pyxis", **BOX}}, AFTER),
    "apptainer": (PLAIN, {"container": {"engine": "apptainer", **BOX}}, AFTER),
}  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def rendered(job=PLAIN, after=None, **options):
    return script(job, SlurmSection.model_validate(options), after or {})


@pytest.mark.parametrize("name", CASES)
def test_a_job_is_rendered_as_the_golden_file_says(name):
    job, options, after = CASES[name]
    text = rendered(job, after, **options)
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_what_is_rendered_is_good_bash(name):
    job, options, after = CASES[name]
    text = rendered(job, after, **options)
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_renders_what_is_submitted_with_names_for_numbers(tmp_path):
    shown = Slurm({}, tmp_path).render(PLAIN, {"a": "17@a", "b": "4@b"})
    assert "#SBATCH --dependency=afterok:17:4\n#SBATCH --kill-on-invalid-dep=yes\n" in shown


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXT, max_size=30))
def test_bash_reads_back_exactly_what_was_quoted(values):
    text = "\n".join([*quoting.array("a", values), r"""printf '%s\0' "${a[@]}" """])
    done = subprocess.run(
        ["bash"], input=text.encode(), capture_output=True, check=True, env={"LC_ALL": "C"}
    )
    expected = b"".join(value.encode() + b"\0" for value in values or [""])
    assert done.stdout == expected


@given(TEXT)
def test_no_value_makes_a_line_of_its_own(value):
    text = quoting.word(value)
    assert "\n" not in text
    assert "\r" not in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a\0b", "'a\\x00b' holds a NUL character, which no program's argument can"),
        ("a\ud800", "'a\\ud800' is no text that UTF-8 can write"),
    ],
)
def test_what_no_argument_can_hold_is_refused(value, message):
    with pytest.raises(UsageError) as caught:
        quoting.word(value)
    assert caught.value.message == message


def test_a_variable_that_bash_cannot_have_is_refused():
    with pytest.raises(UsageError, match="'A-B' cannot be the name of a variable"):
        rendered(replace(PLAIN, env={"A-B": "1"}))


def test_a_name_stands_for_the_number_that_is_not_known_yet(tmp_path):
    shown = Slurm({}, tmp_path).render(PLAIN, {"a": "<id of a>"})
    assert '#SBATCH --dependency="afterok:<id of a>"\n' in shown


def test_a_job_that_people_want_tried_again_is_another_one(tmp_path):
    (tmp_path / "retried.json").write_text('{"round": 2, "before": 1}')
    shown = Slurm({}, tmp_path).render(replace(PLAIN, folder=str(tmp_path)), {})
    assert f"#SBATCH --comment=toolkit:{PLAIN.id}:2\n" in shown


def test_a_secret_comes_from_a_file_or_not_at_all():
    assert "TOKEN=\"$(cat -- '/a b')\" || ended 3; export TOKEN" in rendered(
        replace(PLAIN, secrets={"TOKEN": "file:/a b"})
    )
    assert 'TOKEN="$(cat -- "$HOME"/.token)"' in rendered(
        replace(PLAIN, secrets={"TOKEN": "file:~/.token"})
    )
    with pytest.raises(UsageError) as caught:
        rendered(replace(PLAIN, secrets={"TOKEN": "env:TOKEN"}))
    assert (
        caught.value.message == "secret TOKEN: Slurm has no place for secrets such as 'env:TOKEN'"
    )
    assert caught.value.hint == (
        "put it into a file that only you can read: chmod 600 PATH; TOKEN: file:/PATH"
    )


def test_a_folder_that_slurm_would_take_for_a_pattern_is_none():
    text = rendered(replace(PLAIN, folder="/a%j/jobs"))
    assert "#SBATCH --output=/dev/null\n" in text
    assert "cd -- /a%j/jobs || exit\nexec >>slurm.txt 2>&1\n" in text


def test_a_workspace_that_cannot_be_mounted_is_refused():
    job = replace(PLAIN, folder="/a,b/jobs/c/d")
    with pytest.raises(UsageError, match=r"the workspace /a,b cannot be mounted"):
        rendered(job, container={"engine": "apptainer", "image": "a.sif"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("-p gpu", "'-p gpu' is no long option of sbatch: write it as --name=value or --name"),
        ("--a\n#SBATCH --b", r"'--a\n#SBATCH --b' must be one line of text"),
        ("--requeue", "--requeue is set by the toolkit"),
        ("--time=5", "--time is set by the toolkit"),
        ("--clusters=other", "--clusters is set by the toolkit"),
    ],
)
def test_options_that_would_change_the_rules_are_refused(given, message):
    with pytest.raises(ValidationError) as caught:
        SlurmSection(options=(given,))
    assert message in str(caught.value)


def test_every_option_that_we_render_is_ours():
    places = {
        "partition",
        "account",
        "qos",
        "constraint",
        "reservation",
        "exclusive",
        "gres",
        "mem",
    }
    lines = [line for name in CASES for line in rendered(*CASES[name][::2]).splitlines()]
    names = {line[10:].partition("=")[0] for line in lines if line.startswith("#SBATCH")}
    assert names - set(OURS) <= places | {"cpus-per-task"}


# --- Slurm's words ---------------------------------------------------------------------------------------------------

DOCUMENTED = """
BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING PREEMPTED RUNNING
SUSPENDED TIMEOUT COMPLETING CONFIGURING EXPEDITING LAUNCH_FAILED POWER_UP_NODE RECONFIG_FAIL REQUEUED REQUEUE_FED
REQUEUE_HOLD RESIZING RESV_DEL_HOLD REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED UPDATE_DB
"""


def test_all_words_of_the_documentation_are_known():
    assert sorted(WORDS) == sorted(DOCUMENTED.split())


def test_an_unknown_word_is_an_error():
    with pytest.raises(UnknownStateError, match="Slurm says that a job is 'LEVITATING'"):
        state_of("LEVITATING")


def test_the_accounting_says_who_cancelled():
    assert state_of("CANCELLED by 1000") is State.cancelled


def test_a_job_that_waits_for_the_second_time_was_preempted():
    assert state_of("PENDING") is State.queued
    assert state_of("PENDING", restarts=1) is State.preempted
    assert state_of("RUNNING", restarts=1) is State.running


# --- Slurm's programs, played by scripts -----------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Write a program that PATH finds first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name, body):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)

    return write


def row(number=17, *, name="j", word="RUNNING", code="0", restarts=0, comment="toolkit:j"):
    return f"{number}|{name}|{word}|None|{code}|{restarts}|n1|{comment}|"


@pytest.fixture
def engine(tmp_path):
    return Slurm({"timeout_s": 20}, tmp_path / "jobs")


def test_a_number_that_came_to_another_job_is_not_ours(programs, engine):
    programs("squeue", f"echo '{row(comment='(null)', name='theirs')}'")
    programs("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert engine.seen(["17@j"]) == {}
    programs("squeue", f"echo '{row(name='k', comment='toolkit:k')}'")
    assert engine.seen(["17@j"]) == {}


def test_a_job_that_has_our_number_only_is_not_cancelled(programs, engine, tmp_path):
    programs("squeue", f"echo '{row(name='k', comment='toolkit:k')}'")
    programs("scancel", f'echo "$@" >>{tmp_path}/cancelled')
    engine.cancel(["17@j"])
    assert not (tmp_path / "cancelled").exists()
    engine.cancel(["17@k"])
    assert (tmp_path / "cancelled").read_text() == "17\n"


def test_five_hundred_jobs_are_one_call(programs, engine, tmp_path):
    lines = "\n".join(row(n, name=f"j{n}", comment=f"toolkit:j{n}") for n in range(500))
    programs("squeue", f"echo call >>{tmp_path}/calls; cat <<'X'\n{lines}\nX")
    assert len(engine.seen([f"{n}@j{n}" for n in range(500)])) == 500
    assert (tmp_path / "calls").read_text() == "call\n"


def test_what_slurmctld_forgot_the_accounting_tells(programs, engine):
    programs("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    programs("sacct", "echo '17|j|CANCELLED by 1000|0:15|n[1-2]'")
    seen = engine.seen(["17@j"])["17@j"]
    assert (seen.state, seen.word, seen.reason) == (
        State.cancelled, "CANCELLED by 1000", "CANCELLED by 1000",
    )  # fmt: skip


def test_without_accounting_the_script_told_how_it_ended(programs, engine, tmp_path):
    programs("squeue", "exit 0")
    programs("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    folder = tmp_path / "jobs" / "c" / "j"
    folder.mkdir(parents=True)
    (folder / "slurm.json").write_text('{"job": 17, "restarts": 0, "exit_code": 3}')
    seen = engine.seen(["17@j", "18@j"])
    assert list(seen) == ["17@j"]
    assert (seen["17@j"].state, seen["17@j"].exit_code) == (State.failed, 3)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("0:0", 0),
        ("3:0", 3),
        ("0:9", -9),
        ("768", 3),
        ("9", -9),
        ("0:53", None),
        ("53", None),
        ("", None),
    ],
)
def test_exit_codes_are_read_in_both_forms(text, code):
    assert client._exit_code(text) == code


def test_a_refusal_comes_in_slurms_words_with_what_to_do(programs, tmp_path):
    programs(
        "sbatch",
        "echo 'sbatch: error: Batch job submission failed: Invalid account or account/partition"
        " combination specified' >&2; exit 1",
    )
    with pytest.raises(BackendError) as caught:
        Client().sbatch("#!/bin/bash", tmp_path)
    assert caught.value.message == (
        "sbatch: Batch job submission failed: Invalid account or account/partition combination specified"
    )
    assert caught.value.hint == (
        "give `slurm: {account: ...}` in the profile: sacctmgr show associations user=$USER"
    )


def test_a_controller_that_does_not_answer_has_a_deadline(programs):
    programs("squeue", "exec sleep 60")
    with pytest.raises(BackendError) as caught:
        Client(0.2).queue(["1"])
    assert caught.value.message == "squeue gave no answer within 0.2 s"
    assert caught.value.hint == (
        "slurmctld is down or busy (scontrol ping); nothing is lost: run the command again"
    )


def test_where_no_slurm_is_installed_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotInstalledError) as caught:
        Client().queue(["1"])
    assert caught.value.message == "there is no squeue on PATH: Slurm is not installed here"
    assert caught.value.hint == "run this on a login node of the cluster, or load its module first"


def test_the_number_is_found_among_what_plugins_print(programs, tmp_path):
    programs("sbatch", "echo 'your project has 12 hours left'; echo '123;cluster'")
    assert Client().sbatch("#!/bin/bash", tmp_path) == "123"
    programs("sbatch", "echo thanks")
    with pytest.raises(BackendError, match="sbatch answered without a job's number: 'thanks'"):
        Client().sbatch("#!/bin/bash", tmp_path)


def test_neither_options_for_sbatch_nor_secrets_go_along():
    given = {
        "PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "SLURM_CONF": "/s", "BASH_FUNC_module%%": "() { :; }",
        "SBATCH_PARTITION": "x", "SLURM_JOB_ID": "3", "SLURM_CPU_BIND": "x", "HF_TOKEN": "secret", "PYTHONPATH": "/p",
    }  # fmt: skip
    kept = {"PATH", "HOME", "LC_ALL", "SLURM_CONF", "BASH_FUNC_module%%"}
    assert set(client.carried(given)) == kept


# --- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slurm", "slurm-container"])
def test_profiles_and_templates_make_scripts(name):
    for profile in (name, shipped("jobs/templates") / f"{name}.yaml"):
        loaded = profiles.load(profile)
        assert loaded.backend == "slurm"
        job = replace(PLAIN, secrets=loaded.secrets, env=loaded.variables)
        done = subprocess.run(
            ["bash", "-n"], input=rendered(job, **loaded.options), text=True, check=False
        )
        assert done.returncode == 0


def test_the_container_template_shows_all_keys_of_its_section():
    options = profiles.load(shipped("jobs/templates") / "slurm-container.yaml").options
    assert all(options["container"].values())
