"""An array of jobs as one batch script: what differs stands in a ``case``, by the number of the task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from toolkit.launch.arrays import Array, round_of
from toolkit.launch.slurm.quoting import array as words_of
from toolkit.launch.slurm.quoting import word
from toolkit.launch.slurm.render import (
    APPEND,
    ENDED,
    MARK,
    Words,
    body,
    directives,
    joined,
    mark,
    number,
)
from toolkit.launch.slurm.section import SlurmSection
from toolkit.launch.spec import JobSpec

SPLIT = 10
"""Tasks of an array whose ``aftercorr`` Slurm looks at one by one (``correspond_after_task_cnt``, if nobody set it).

Of those beyond, it looks only when one of the first ones began, and then has perhaps forgotten what they wait for. As
Slurm 22.05 was seen to do it, they are then cancelled though the task before succeeded, or begin though it failed.
"""
WORDS = Words(
    number="$toolkit_task",
    id="$toolkit_job",
    mark='"$toolkit_mark"',
    folder='"$toolkit_folder"',
)
"""A task is never called by ``SLURM_JOB_ID``: that of one task is the number of the whole array."""


def array_script(array: Array, options: SlurmSection) -> str:
    """What sbatch reads.

    Raises:
        UsageError: A value cannot stand in a script.
    """
    job, name = next(iter(array.tasks.values())), array.name
    names = [
        ("job-name", name),
        ("comment", f"{MARK}{name}"),
        ("array", f"{_ranges(array.tasks)}%{array.parallel}"),
        ("output", "/dev/null"),  # each task opens its own
    ]
    begin = [
        'toolkit_task="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        'case "$SLURM_ARRAY_TASK_ID" in',
        *(line for task in array.tasks.items() for line in _task(*task, waits=bool(array.after))),
        "esac",
        f"cd -- {WORDS.folder} || exit",
        APPEND,
    ]
    program = ['program=("${toolkit_program[@]}")']
    return joined(
        directives(job, options, names, _dependency(array)),
        begin,
        body(job, options, WORDS, [*(_CHECK if array.after else ()), *program]),
    )


_CHECK = (
    'for place in "${toolkit_after[@]}"; do',
    f"""  grep -qs '"exit_code": 0}}' "$place/{ENDED}" && continue""",
    '  echo "${place##*/} did not succeed"; ended 1',
    "done",
)
"""Slurm may let a task begin whose predecessor failed: after :data:`SPLIT`."""


def _dependency(array: Array) -> str | None:
    """Each after the one of its number. Many begin at the latest when all before are over, and look for themselves."""
    if not array.after:
        return None
    before = ":".join(sorted({number(one).rpartition("_")[0] for one in array.after.values()}))
    return f"aftercorr:{before}" + (f"?afterany:{before}" if len(array.tasks) > SPLIT else "")


def _task(task: int, job: JobSpec, *, waits: bool) -> Iterator[str]:
    yield f"{task})"
    yield f"  toolkit_job={job.id} toolkit_mark={word(mark(job.id, round_of(job)))}"
    yield f"  toolkit_folder={word(job.folder)}"
    if waits:
        places = (str(Path(job.folder).with_name(name)) for name in job.after)
        yield from (f"  {line}" for line in words_of("toolkit_after", places))
    yield from (f"  {line}" for line in words_of("toolkit_program", job.argv))
    yield "  ;;"


def _ranges(tasks: Iterable[int]) -> str:
    """``0-3,5``."""
    found: list[list[int]] = []
    for task in sorted(tasks):
        if found and found[-1][1] == task - 1:
            found[-1][1] = task
        else:
            found.append([task, task])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in found)
