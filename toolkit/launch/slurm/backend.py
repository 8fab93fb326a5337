"""Slurm as a place for jobs: dependencies and new starts are its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from toolkit.launch.folder import JobFolder, read
from toolkit.launch.slurm.client import Client, Row
from toolkit.launch.slurm.render import ENDED, MARK, OUTPUT, mark, number, script
from toolkit.launch.slurm.section import SlurmSection
from toolkit.launch.slurm.states import state_of
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Cause, Seen, State

_NUMBER = re.compile(r"\d+(_\d+)?")
_CHAIN = re.compile(r"(.+?-[0-9a-f]{8})-\d\d-")
"""The chain's id in a job's."""


class Slurm:
    """A :class:`~toolkit.launch.backend.Backend`. Its ids are ``17@tickets-3fa2c1d4-04-train``.

    Slurm's number alone would not do: a slurmctld that was killed may forget a job that it acknowledged, and give its
    number to the next one. Ours is in the job's name and comment, and what differs is not that job.

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
        waits = {name: one for name, one in after.items() if not _done(folder.with_name(name))}
        return script(job, self._options, waits, _round(folder))

    def submit(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """Hand it over, unless Slurm has it already; one that is lost is started again.

        Raises:
            BackendError: Slurm refuses, or does not answer.
            NotInstalledError: There is no Slurm here.
        """
        known = self._known(job)
        if known is None:
            return f"{self._client.sbatch(self.render(job, after), Path(job.folder))}@{job.id}"
        engine_id, row = known
        if row and _lost(JobFolder(Path(job.folder)), row):
            self._client.requeue(row.number)
        return engine_id

    def _known(self, job: JobSpec) -> tuple[str, Row | None] | None:
        """The job's id and what Slurm says, if it was handed over since people last wanted it tried.

        One that ended counts if it left something in this folder: a workspace that was deleted had this id too.
        """
        folder = JobFolder(Path(job.folder))
        wanted = mark(job.id, _round(folder.path))
        rows = [row for row in self._client.named(job.id) if row.comment == wanted]
        found = {f"{row.number}@{job.id}": row for row in rows if not _refused(row)}
        for engine_id, row in reversed(found.items()):
            if not state_of(row.word).ended:
                return engine_id, row
        left = _left_ids(folder, wanted)
        for engine_id in reversed(left):
            if engine_id in found:
                return engine_id, found[engine_id]
        silent = any(one.ended is None and one.is_silent() for one in folder.attempts[-1:])
        return (left[-1], None) if left and not silent else None

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
        wanted = set(ids)
        ours = ((f"{row.number}@{row.name}", row) for row in rows if _ours(row))
        found = {engine_id: _seen(row) for engine_id, row in ours if engine_id in wanted}
        return {one: self._explained(one, seen) for one, seen in found.items()}

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


def _done(folder: Path) -> bool:
    """Whether a job succeeded: Slurm may have forgotten it, and what depends on an unknown job never starts."""
    last = JobFolder(folder).attempts[-1:]
    return any((attempt.ended or {}).get("cause") == Cause.done for attempt in last)


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
