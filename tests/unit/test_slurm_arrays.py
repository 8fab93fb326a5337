"""Arrays: which chains may be one, their scripts (tests/golden/slurm, UPDATE_GOLDEN=1), what Slurm says of tasks."""

import json
import os
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_slurm import GOLDEN, PLAIN, engine, programs, row
from toolkit.errors import BackendError
from toolkit.launch import arrays
from toolkit.launch.arrays import Array, ArrayBackend
from toolkit.launch.folder import write
from toolkit.launch.local import Local
from toolkit.launch.slurm import Slurm
from toolkit.launch.slurm.client import Client, expanded
from toolkit.launch.slurm.render_array import _ranges, array_script
from toolkit.launch.slurm.section import SlurmSection
from toolkit.launch.spec import Resources
from toolkit.launch.states import State

__all__ = ["engine", "programs"]  # fixtures
JOBS = "/home/ada/my work/jobs"


def trial(number, *steps, jobs=JOBS, **changes):
    """The jobs of one trial, as a submitter writes them."""
    chain = f"tickets-{number:08x}"
    ids = [f"{chain}-{n:02d}-{step}" for n, step in enumerate(steps, 1)]
    return [
        replace(
            PLAIN,
            id=ids[n],
            chain=chain,
            step=step,
            stage=step,
            folder=f"{jobs}/{chain}/{ids[n]}",
            after=tuple(ids[max(0, n - 1) : n]),
            argv=(*PLAIN.argv[:-1], f"{jobs}/{chain}/{ids[n]}"),
            **changes,
        )
        for n, step in enumerate(steps)
    ]


def made(trials, *, parallel=2):
    """All arrays of trials, as a dry run shows them."""
    return [text for _, _, text in arrays.rendered(Slurm({}, JOBS), trials, parallel)]


def text_of(count, after=True):
    jobs = [trial(n, "data", "train") for n in range(count)]
    ids = {one[0].id: f"17_{n}@{one[0].id}" for n, one in enumerate(jobs)} if after else {}
    array = Array({n: one[1] for n, one in enumerate(jobs)}, ids, 2)
    return array_script(array, SlurmSection())


def lines(text, begin="#SBATCH"):
    return [line for line in text.splitlines() if line.startswith(begin)]


# --- scripts ---------------------------------------------------------------------------------------------------------


def test_an_array_is_rendered_as_the_golden_file_says():
    text = text_of(3)
    path = GOLDEN / "array.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("text", [text_of(3), text_of(12), text_of(2, after=False)])
def test_what_is_rendered_is_good_bash(text):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_trial_is_a_task_of_one_array_for_each_step():
    first, second = made([trial(n, "data", "train") for n in range(4)])
    name = lines(first, "#SBATCH --job-name=array-")[0].partition("=")[2]
    assert name.endswith("-01-data")
    assert f"#SBATCH --comment=toolkit:{name}" in lines(first)
    assert "#SBATCH --array=0-3%2" in lines(first)
    assert not lines(first, "#SBATCH --dependency")
    assert f'#SBATCH --dependency="aftercorr:<id of {name}>"' in lines(second)
    assert "#SBATCH --kill-on-invalid-dep=yes" in lines(second)


def test_many_tasks_may_begin_when_all_before_are_over_and_look_for_themselves():
    assert "#SBATCH --dependency=aftercorr:17" in lines(text_of(10))
    assert '#SBATCH --dependency="aftercorr:17?afterany:17"' in lines(text_of(11))
    assert "did not succeed" in text_of(11)
    assert "did not succeed" not in text_of(11, after=False)


@pytest.mark.parametrize(("task", "code"), [("0", 0), ("1", 1), ("2", 1)])
def test_a_task_starts_its_own_program_if_the_one_before_succeeded(tmp_path, task, code):
    """The script as bash runs it: no Slurm is needed for that."""
    trials = [trial(n, "data", "train", jobs=str(tmp_path)) for n in range(3)]
    trials = [[a, replace(b, argv=("touch", f"{b.folder}/began"))] for a, b in trials]
    for one in (job for jobs in trials for job in jobs):
        write_folder(one)
    for n, code_before in enumerate((0, 3)):  # the third one left nothing
        (tmp_path / trials[n][0].chain / trials[n][0].id / "slurm.json").write_text(
            f'{{"job": "17_{n}", "mark": "", "restarts": 0, "exit_code": {code_before}}}\n'
        )
    ids = {jobs[0].id: f"17_{n}@{jobs[0].id}" for n, jobs in enumerate(trials)}
    text = array_script(
        Array({n: jobs[1] for n, jobs in enumerate(trials)}, ids, 2), SlurmSection()
    )
    names = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": task}
    done = subprocess.run(
        ["bash"], input=text, text=True, env={"PATH": os.environ["PATH"], **names}, check=False
    )
    assert done.returncode == code
    job = trials[int(task)][1]
    left = json.loads((tmp_path / job.chain / job.id / "slurm.json").read_text())
    assert left == {
        "job": f"18_{task}",
        "mark": f"toolkit:{job.id}",
        "restarts": 0,
        "exit_code": code,
    }
    assert (tmp_path / job.chain / job.id / "began").exists() == (code == 0)
    said = (tmp_path / job.chain / job.id / "slurm.txt").read_text()
    assert said == ("" if code == 0 else f"{trials[int(task)][0].id} did not succeed\n")


def write_folder(job, **files):
    from pathlib import Path

    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write(folder / f"{name}.json", content)
    return folder


def test_the_name_is_that_of_its_jobs_and_their_round(tmp_path):
    jobs = [trial(n, "data", jobs=str(tmp_path))[0] for n in range(2)]
    both = Array(dict(enumerate(jobs)), {}, 2)
    assert both.name == replace(both, parallel=9).name
    assert both.name != Array({0: jobs[0]}, {}, 2).name
    name = both.name
    write_folder(jobs[1], retried={"round": 2, "before": 1})
    assert replace(both).name != name


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_are_read_back(tasks):
    assert expanded(f"17_[{_ranges(tasks)}%4]") == [f"17_{n}" for n in sorted(tasks)]


# --- which chains ----------------------------------------------------------------------------------------------------


def groups(chains, ids=None):
    return [[jobs[0].id for jobs in group] for group in arrays.alike(chains, ids or {})]


def test_chains_with_other_steps_resources_or_variables_are_not_alike():
    two = [trial(n, "data", "train") for n in range(2)]
    other = [
        trial(2, "train"),
        trial(3, "data", "train", resources=Resources(gpus=2)),
        trial(4, "data", "train", env={"NOTE": "else"}),
        trial(5, "data", "train", jobs="/elsewhere/jobs"),
    ]
    assert [len(group) for group in groups([*two, *other])] == [2, 1, 1, 1, 1]


def test_chains_that_wait_for_the_same_array_keep_their_numbers():
    chains = [trial(n, "data", "train") for n in range(4)]
    ids = {chain[0].id: f"17_{9 - n}@x" for n, chain in enumerate(chains[:3])}
    ids[chains[3][0].id] = "18@x"
    both = arrays.alike(chains, ids)
    assert [len(group) for group in both] == [3, 1]
    (array,) = arrays.arrays(both[0], ids, 2)
    assert sorted(array.tasks) == [7, 8, 9]
    assert array.tasks[9] is chains[0][1]


def test_a_chain_whose_earlier_step_is_done_waits_for_nothing(tmp_path):
    chains = [trial(n, "data", "train", jobs=str(tmp_path)) for n in range(3)]
    ids = {chain[0].id: f"17_{n}@x" for n, chain in enumerate(chains)}
    attempt = write_folder(chains[0][0]) / "attempts" / "1"
    attempt.mkdir(parents=True)
    write(attempt / "ended.json", {"cause": "done"})
    assert groups(chains, ids) == [[chains[0][1].id], [chains[1][1].id, chains[2][1].id]]


def test_what_is_handed_over_is_not_given_again():
    chain = trial(1, "data")
    assert groups([chain], {chain[0].id: "17@x"}) == []


def test_engines_without_arrays_are_known(tmp_path):
    assert isinstance(Slurm({}, tmp_path), ArrayBackend)
    assert not isinstance(Local({"folder": str(tmp_path)}, tmp_path), ArrayBackend)


# --- what Slurm says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        ("17", ["17"]),
        ("17_3", ["17_3"]),
        ("17_[3-5%2]", ["17_3", "17_4", "17_5"]),
        ("17_[0,4-8:2,11%1]", ["17_0", "17_4", "17_6", "17_8", "17_11"]),
    ],
)
def test_tasks_that_share_a_line_are_read(given, tasks):
    assert expanded(given) == tasks


def task_folder(tmp_path, name, task, round_=1):
    folder = tmp_path / "jobs" / "c" / name
    folder.mkdir(parents=True)
    write(folder / "array.json", {"name": "array-1-01-a", "task": task, "round": round_})
    return folder


def array_row(number, **more):
    return row(number, name="array-1-01-a", comment="toolkit:array-1-01-a", **more)


def test_tasks_are_found_by_the_name_of_their_array_in_one_call(programs, engine, tmp_path):
    for n in range(3):
        task_folder(tmp_path, f"j{n}", n)
    told = [array_row("17_0"), array_row("17_1", word="PENDING", restarts=1), row("17_2", name="k")]
    body = "\n".join(told)
    programs("squeue", f"echo call >>{tmp_path}/calls; cat <<'X'\n{body}\nX")
    programs("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    seen = engine.seen(["17_0@j0", "17_1@j1", "17_2@j2"])
    assert {name: one.state for name, one in seen.items()} == {
        "17_0@j0": State.running, "17_1@j1": State.preempted,
    }  # fmt: skip
    assert (tmp_path / "calls").read_text() == "call\n"


def test_the_accounting_keeps_tasks_that_never_began_in_one_line(programs, engine, tmp_path):
    for n in range(4):
        task_folder(tmp_path, f"j{n}", n)
    programs("squeue", "exit 0")
    kept = [
        "17_1|array-1-01-a|COMPLETED|0:0|n1",
        "17_[0-2%2]|array-1-01-a|CANCELLED by 7|0:0|None assigned",
    ]
    body = "\n".join([*kept, "17_[3]|array-1-01-a|PENDING|0:0|None assigned"])
    programs("sacct", f"echo \"$@\" >>{tmp_path}/asked; cat <<'X'\n{body}\nX")
    seen = engine.seen([f"17_{n}@j{n}" for n in range(4)])
    assert {name: one.word for name, one in seen.items()} == {
        "17_0@j0": "CANCELLED by 7", "17_1@j1": "COMPLETED", "17_2@j2": "CANCELLED by 7",
    }  # fmt: skip
    assert (tmp_path / "asked").read_text().endswith("--jobs=17\n")


def test_cancel_names_the_task_and_not_the_array(programs, engine, tmp_path):
    task_folder(tmp_path, "j3", 3)
    programs("squeue", f"echo '{array_row('17_3')}'")
    programs("scancel", f'echo "$@" >>{tmp_path}/cancelled')
    engine.cancel(["17_3@j3"])
    assert (tmp_path / "cancelled").read_text() == "17_3\n"


@pytest.mark.parametrize(("round_", "found"), [(1, True), (2, False)])
def test_a_task_of_an_earlier_round_is_not_the_job(programs, engine, tmp_path, round_, found):
    job = replace(PLAIN, id="j3", chain="c", folder=str(task_folder(tmp_path, "j3", 3)))
    if round_ > 1:
        write(tmp_path / "jobs" / "c" / "j3" / "retried.json", {"round": round_, "before": 1})
    programs("squeue", f"echo '{array_row('17_3', word='PENDING')}'; echo '{array_row('17_4')}'")
    programs("sbatch", "echo 20")
    programs("scancel", f'echo "$@" >>{tmp_path}/cancelled')
    assert engine.found([job]) == ({"j3": "17_3@j3"} if found else {})
    assert engine.submit(job, {}) == ("17_3@j3" if found else "20@j3")
    assert (tmp_path / "cancelled").exists() != found


def test_too_many_tasks_are_refused_with_where_the_limit_stands(programs, tmp_path):
    programs(
        "sbatch",
        "echo 'sbatch: error: Batch job submission failed: Invalid job array specification' >&2; exit 1",
    )
    with pytest.raises(BackendError) as caught:
        Client().sbatch("#!/bin/bash", tmp_path)
    assert caught.value.hint == (
        "more at once than MaxArraySize of `scontrol show config` allows: fewer trials"
    )
