"""Slurm as a place for jobs: dependencies and new starts are its own."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from toolkit.launch.arrays import Array
from toolkit.launch.folder import JobFolder, read
from toolkit.launch.slurm.client import Client, Row
from toolkit.launch.slurm.render import ENDED, MARK, OUTPUT, mark, number, script
from toolkit.launch.slurm.render_array import array_script
from toolkit.launch.slurm.section import SlurmSection
from toolkit.launch.slurm.states import state_of
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Seen, State

Named = Mapping[tuple[str, str], Sequence[Row]]
"""Rows by name, and by the number of the task (empty where there is no array)."""
_NUMBER = re.compile(r"\d+(_\d+)?")
_CHAIN = re.compile(r"(.+?-[0-9a-f]{8})-\d\d-")
"""The chain's id in a job's."""


class Slurm:
    """An :class:`~toolkit.launch.arrays.ArrayBackend`. Its ids are ``17@tickets-3fa2c1d4-04-train``, ``17_3@...``.

    Slurm's number alone would not do: a slurmctld that was killed may forget a job that it acknowledged, and give its
    number to the next one. Ours is in the job's name and comment, and what differs is not that job.
    An array has a name of its own; the folders of its jobs say which.

    Args:
        options: The profile's ``slurm`` section, or its plain data.
        folder: The workspace's ``jobs`` folder.
    """

    name: ClassVar[str] = "slurm"
    ordered: ClassVar[bool] = True

    def __init__(self, options: SlurmSection | Mapping[str, Any] | None, folder: Path) -> None:
        self._options = SlurmSection.model_validate(options or {})
        self._folder = folder
        self._client = Client(self._options.timeout_s)

    def render(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """The batch script; it goes to ``sbatch --parsable --chdir=FOLDER``.

        Raises:
            UsageError: A value cannot stand in a script.
        """
        folder = Path(job.folder)
        waits = {
            name: one for name, one in after.items() if not JobFolder(folder.with_name(name)).done
        }
        return script(job, self._options, waits, _round(folder))

    def submit(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """Hand it over, unless Slurm has it already; one that is lost is started again.

        Raises:
            BackendError: Slurm refuses, or does not answer.
            NotInstalledError: There is no Slurm here.
        """
        rows = self._named([job])
        known = _known(job, rows)
        if known is None:
            self._client.scancel(_outdated(job, rows))
            return f"{self._client.sbatch(self.render(job, after), Path(job.folder))}@{job.id}"
        engine_id, row = known
        if row and _lost(JobFolder(Path(job.folder)), row):
            self._client.requeue(row.number)
        return engine_id

    def render_array(self, array: Array) -> str:
        """The batch script of an array; it goes to ``sbatch --parsable --chdir=JOBS``.

        Raises:
            UsageError: A value cannot stand in a script.
        """
        return array_script(array, self._options)

    def submit_array(self, array: Array) -> Mapping[str, str]:
        """Hand it over; whether Slurm has some of its jobs, :meth:`found` knows.

        Raises:
            BackendError: Slurm refuses, or does not answer.
            NotInstalledError: There is no Slurm here.
        """
        slurm_id = self._client.sbatch(self.render_array(array), self._folder)
        return {job.id: f"{slurm_id}_{task}@{job.id}" for task, job in array.tasks.items()}

    def found(self, jobs: Sequence[JobSpec]) -> Mapping[str, str]:
        """Those that were handed over since people last wanted them tried.

        Raises:
            BackendError: Slurm does not answer.
        """
        rows = self._named(jobs)
        known = {job.id: _known(job, rows) for job in jobs}
        return {name: one[0] for name, one in known.items() if one}

    def _named(self, jobs: Sequence[JobSpec]) -> Named:
        """All rows under the names of these jobs, and of the arrays that they are tasks of."""
        names = [name for job in jobs for name, _ in _names(job)]
        rows: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self._client.named(list(dict.fromkeys(names))) if names else []:
            if _ours(row):
                rows[row.name, row.number.partition("_")[2]].append(row)
        return rows

    def seen(self, ids: Sequence[str]) -> Mapping[str, Seen]:
        """By slurmctld, then by the accounting, then by what the scripts left; forgotten ones are left out.

        Raises:
            BackendError: Slurm does not answer.
            UnknownStateError: It says what is in no table.
        """
        asked = {one: number(one) for one in ids if _NUMBER.fullmatch(number(one))}
        found = self._among(ids, self._client.queue(list(asked.values())) if asked else [])
        rest = [one for one in asked if one not in found]
        if rest:
            found |= self._among(rest, self._client.accounting([asked[one] for one in rest]))
        left = {one: self._left_by_script(one) for one in rest if one not in found}
        return found | {one: seen for one, seen in left.items() if seen}

    def _among(self, ids: Sequence[str], rows: Sequence[Row]) -> dict[str, Seen]:
        wanted = {(number(one), self._slurm_name(one)): one for one in ids}
        ours = {(row.number, row.name): row for row in rows if _ours(row)}
        found = {one: _seen(ours[key]) for key, one in wanted.items() if key in ours}
        return {one: self._explained(one, seen) for one, seen in found.items()}

    def _slurm_name(self, engine_id: str) -> str:
        """What Slurm calls it: a task has the name of its array."""
        slurm_id, _, our_id = engine_id.partition("@")
        array = JobFolder(self._place(our_id)).array if "_" in slurm_id else None
        return str(array["name"]) if array else our_id

    def _explained(self, engine_id: str, seen: Seen) -> Seen:
        """With the last words of a script that failed before the program began: a module, a path, a container."""
        if seen.state is not State.failed:
            return seen
        folder = self._place(engine_id.partition("@")[2])
        if JobFolder(folder).attempts:
            return seen
        said = _last_line(folder / OUTPUT)
        return replace(seen, reason=f"{seen.reason or seen.word}: {said}") if said else seen

    def _left_by_script(self, engine_id: str) -> Seen | None:
        slurm_id, _, our_id = engine_id.partition("@")
        ended = read(self._place(our_id) / ENDED) or {}
        if str(ended.get("job")) != slurm_id:
            return None
        code = int(ended["exit_code"])
        state = State.failed if code else State.succeeded
        return Seen(state, "forgotten", "Slurm forgot it; its script wrote this", code)

    def _place(self, our_id: str) -> Path:
        """A job's folder; that of nobody where there is none."""
        if begins := _CHAIN.match(our_id):
            return self._folder / begins[1] / our_id
        return next(self._folder.glob(f"*/{our_id}"), self._folder / our_id)

    def cancel(self, ids: Sequence[str]) -> None:
        """SIGTERM to all their processes, SIGKILL after the cluster's KillWait.

        Raises:
            BackendError: Slurm does not answer.
        """
        rows = self._client.queue([number(one) for one in ids]) if ids else []
        alive = [one for one, seen in self._among(ids, rows).items() if not seen.state.ended]
        self._client.scancel([number(one) for one in alive])

    def logs(self, job: JobSpec, engine_id: str) -> Iterator[str] | None:  # noqa: ARG002
        """``None``: the job's folder is on a file system that both see."""
        return None


def _round(folder: Path) -> int:
    return int(JobFolder(folder).retried["round"])


def _names(job: JobSpec) -> list[tuple[str, str]]:
    """Under which names, and numbers of a task, Slurm may have it: its own, and that of its last array."""
    array = JobFolder(Path(job.folder)).array
    return [(job.id, ""), *([(str(array["name"]), str(array["task"]))] if array else [])]


def _is_current(folder: JobFolder) -> bool:
    """Whether nobody wanted the job tried again since it came into its last array."""
    return folder.array is not None and folder.array["round"] == _round(folder.path)


def _known(job: JobSpec, rows: Named) -> tuple[str, Row | None] | None:
    """The job's id and what Slurm says, if it was handed over since people last wanted it tried.

    One that ended counts if it left something in this folder: a workspace that was deleted had this id too.
    """
    folder = JobFolder(Path(job.folder))
    wanted = mark(job.id, _round(folder.path))
    ours = [row for row in rows.get((job.id, ""), ()) if row.comment == wanted]
    if _is_current(folder):
        ours += [row for key in _names(job)[1:] for row in rows.get(key, ())]
    found = {f"{row.number}@{job.id}": row for row in ours if not _refused(row)}
    for engine_id, row in reversed(found.items()):
        if not state_of(row.word).ended:
            return engine_id, row
    left = _left_ids(folder, wanted)
    for engine_id in reversed(left):
        if engine_id in found:
            return engine_id, found[engine_id]
    silent = any(one.ended is None and one.is_silent() for one in folder.attempts[-1:])
    return (left[-1], None) if left and not silent else None


def _outdated(job: JobSpec, rows: Named) -> list[str]:
    """Tasks of an array that wait for what will never come: people wanted the job tried again since."""
    if _is_current(JobFolder(Path(job.folder))):
        return []
    tasks = (row for key in _names(job)[1:] for row in rows.get(key, ()))
    return [row.number for row in tasks if not state_of(row.word).ended]


def _lost(folder: JobFolder, row: Row) -> bool:
    """Whether the attempt of this very start stopped beating without a word."""
    state, start = state_of(row.word, row.restarts), f"{row.number}.{row.restarts}"
    if not (state.ended or state is State.running):
        return False
    return any(
        one.ended is None and one.is_silent(left=state.ended)
        for one in folder.attempts[-1:]
        if (one.started or {}).get("start") == start
    )


def _left_ids(folder: JobFolder, wanted: str) -> list[str]:
    """Engine ids of which this round left something in the folder, the last one last."""
    begun = [one.started or {} for one in folder.attempts[folder.retried["before"] :]]
    ids = [str(one["engine_id"]) for one in begun if one.get("engine_id")]
    ended = read(folder.path / ENDED) or {}
    if ended.get("mark") == wanted:
        ids.append(f"{ended['job']}@{folder.path.name}")
    return ids


def _last_line(path: Path) -> str:
    try:
        text = path.read_bytes()[-4000:].decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    return text.rpartition("\n")[2]


def _refused(row: Row) -> bool:
    """Slurm keeps a record even of what it refused at once."""
    return row.word == "FAILED" and row.host is None


def _ours(row: Row) -> bool:
    """Whether its comment says so; the accounting may not keep comments, but always the name."""
    return row.comment is None or f"{row.comment}:".startswith(f"{MARK}{row.name}:")


def _seen(row: Row) -> Seen:
    state = state_of(row.word, row.restarts)
    ran = state in (State.succeeded, State.failed)
    return Seen(state, row.word, row.reason, row.exit_code if ran else None, row.host)
