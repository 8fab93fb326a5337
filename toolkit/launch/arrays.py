"""Chains of equal shape, such as the trials of a sweep, as arrays: one for each step, with a task for each chain."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from toolkit import digests
from toolkit.launch.backend import Backend
from toolkit.launch.folder import JobFolder
from toolkit.launch.spec import JobSpec

Ids = Mapping[str, str]
"""Engine ids by ids of ours; those of tasks begin with ``<array's id>_<task>``."""


@dataclass(frozen=True)
class Array:
    """Jobs that differ only in what they are called and where they are.

    Attributes:
        tasks: The jobs by their numbers in it.
        after: Engine ids of the tasks that have to succeed first; each of ``tasks`` waits for that of its own number.
        parallel: How many may run at once.
    """

    tasks: Mapping[int, JobSpec]
    after: Ids
    parallel: int

    @cached_property
    def name(self) -> str:
        """The same for the same jobs in the same round, so that it is found again: ``array-3fa2c1d4-04-train``."""
        first = next(iter(self.tasks.values()))
        content = [(job.id, round_of(job)) for job in self.tasks.values()]
        return f"array-{digests.of_json(content)[:8]}-{first.id.removeprefix(f'{first.chain}-')}"


@runtime_checkable
class ArrayBackend(Backend, Protocol):
    """An engine that takes many jobs in one submission."""

    def render_array(self, array: Array) -> str:
        """What is submitted."""
        ...

    def submit_array(self, array: Array) -> Ids:
        """Hand it over; engine ids of its jobs.

        Raises:
            BackendError: The engine is not there, or refuses; in its words.
        """
        ...

    def found(self, jobs: Sequence[JobSpec]) -> Ids:
        """Those of these that the engine has, whether alone or in an array; asked in one call.

        Raises:
            BackendError: The engine does not answer.
        """
        ...


def round_of(job: JobSpec) -> int:
    """How often people had it tried: 1 before any ``toolkit jobs retry``."""
    return int(JobFolder(Path(job.folder)).retried["round"])


def arrays(group: Sequence[Sequence[JobSpec]], ids: Ids, parallel: int) -> Iterator[Array]:
    """The arrays of a group of :func:`alike`, one for each step that is left.

    Args:
        group: The jobs that are left of each chain.
        ids: What was handed over. Whoever takes an array adds its tasks before the next one.
        parallel: How many tasks of one array may run at once.
    """
    numbers = [_task(jobs, ids) for jobs in group]
    for jobs in zip(*group, strict=True):
        tasks = {
            n if at is None else at: job
            for n, (at, job) in enumerate(zip(numbers, jobs, strict=True))
        }
        yield Array(tasks, _waits(jobs, ids), parallel)


def alike(chains: Sequence[Sequence[JobSpec]], ids: Ids) -> list[list[Sequence[JobSpec]]]:
    """The jobs that are left of each chain, those together that may be one array for each step.

    They have the same steps with the same resources and variables left, and the first one waits for nothing, or for a
    task of the same array. A chain whose earlier step is done, or was handed over alone, differs from the others.
    """
    groups: dict[str, list[Sequence[JobSpec]]] = defaultdict(list)
    for chain in chains:
        left = [job for job in chain if job.id not in ids]
        if left:
            waits = [_array(one) or one for one in _waits(left[:1], ids).values()]
            groups[digests.of_json([[_shape(job) for job in left], waits])].append(left)
    return list(groups.values())


def rendered(
    backend: ArrayBackend, chains: Sequence[Sequence[JobSpec]], parallel: int
) -> Iterator[tuple[str, Sequence[JobSpec], str]]:
    """What would be submitted of chains that are not yet: its name in the engine, its jobs, its text.

    Engine ids that are not known yet stand as ``<id of NAME>``.
    """
    ids: dict[str, str] = {}
    for group in alike(chains, ids):
        if len(group) == 1:
            for job in group[0]:
                after = {name: f"<id of {name}>" for name in job.after}
                yield job.id, (job,), backend.render(job, after)
            continue
        for array in arrays(group, ids, parallel):
            yield array.name, tuple(array.tasks.values()), backend.render_array(array)
            ids |= {job.id: f"<id of {array.name}>_{n}" for n, job in array.tasks.items()}


def _shape(job: JobSpec) -> str:
    """All of a job but its name and place."""
    return replace(
        job, id="", chain="", folder=str(Path(job.folder).parents[1]), after=(), argv=()
    ).to_json()


def _waits(jobs: Sequence[JobSpec], ids: Ids) -> dict[str, str]:
    """Engine ids of what jobs wait for; of nothing where all of it is done: the engine may have forgotten it."""
    before = {name: (job, ids[name]) for job in jobs for name in job.after if name in ids}
    if all(JobFolder(Path(job.folder).with_name(name)).done for name, (job, _) in before.items()):
        return {}
    return {name: engine_id for name, (_, engine_id) in before.items()}


def _array(engine_id: str) -> str | None:
    """The array's own id out of a task's; ``None`` for a job that is in none."""
    return engine_id.partition("@")[0].rpartition("_")[0] or None


def _task(jobs: Sequence[JobSpec], ids: Ids) -> int | None:
    """The number that a chain had in the array that it waits for."""
    of_array = (one.partition("@")[0] for one in _waits(jobs[:1], ids).values() if _array(one))
    return next((int(one.rpartition("_")[2]) for one in of_array), None)
