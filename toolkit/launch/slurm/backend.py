"""Slurm as a place for jobs: dependencies and new starts are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from toolkit.launch.folder import LOST_S, JobFolder, read
from toolkit.launch.slurm.client import Client, Row
from toolkit.launch.slurm.render import ENDED, MARK, number, script
from toolkit.launch.slurm.section import SlurmSection
from toolkit.launch.slurm.states import state_of
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Seen, State


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
        return script(job, self._options, after)

    def submit(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """Hand it over, unless Slurm has it already; one that Slurm calls running and that is lost is started again.

        Raises:
            BackendError: Slurm refuses, or does not answer.
            NotInstalledError: There is no Slurm here.
        """
        known = self._known(job)
        if known is None:
            return f"{self._client.sbatch(self.render(job, after), Path(job.folder))}@{job.id}"
        engine_id, word = known
        if word == "RUNNING" and _lost(JobFolder(Path(job.folder))):
            self._client.requeue(number(engine_id))
        return engine_id

    def _known(self, job: JobSpec) -> tuple[str, str | None] | None:
        """The job's id and Slurm's word, if it was handed over: it is there, or ended and nobody wrote that it began.

        One that ended and is written down was ended before this call: it is to start once more.
        """
        folder = JobFolder(Path(job.folder))
        recorded = (folder.submitted or {}).get("id")
        rows = [row for row in self._client.named(job.id) if _ours(row) and not _refused(row)]
        for row in reversed(rows):
            engine_id = f"{row.number}@{job.id}"
            if engine_id != recorded or not state_of(row.word).ended:
                return engine_id, row.word
        ended = read(folder.path / ENDED)
        return (f"{ended['job']}@{job.id}", None) if ended and not recorded else None

    def seen(self, ids: Sequence[str]) -> Mapping[str, Seen]:
        """By slurmctld, then by the accounting, then by what the scripts left; forgotten ones are left out.

        Raises:
            BackendError: Slurm does not answer.
            UnknownStateError: It says what is in no table.
        """
        found = self._among(ids, self._client.queue([number(one) for one in ids]) if ids else [])
        rest = [one for one in ids if one not in found]
        if rest:
            found |= self._among(rest, self._client.accounting([number(one) for one in rest]))
        return found | {
            one: seen for one in rest if one not in found and (seen := self._left_by_script(one))
        }

    def _among(self, ids: Sequence[str], rows: Sequence[Row]) -> dict[str, Seen]:
        wanted = set(ids)
        ours = ((f"{row.number}@{row.name}", row) for row in rows if _ours(row))
        return {engine_id: _seen(row) for engine_id, row in ours if engine_id in wanted}

    def _left_by_script(self, engine_id: str) -> Seen | None:
        slurm_id, _, our_id = engine_id.partition("@")
        for place in self._folder.glob(f"*/{our_id}/{ENDED}"):
            ended = read(place)
            if ended and str(ended["job"]) == slurm_id:
                code = int(ended["exit_code"])
                state = State.failed if code else State.succeeded
                return Seen(state, "forgotten", "Slurm forgot it; its script wrote this", code)
        return None

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


def _lost(folder: JobFolder) -> bool:
    """Whether its last attempt stopped beating without a word."""
    last = folder.attempts[-1] if folder.attempts else None
    return last is not None and last.ended is None and (last.beat_age_s() or 0) > LOST_S


def _refused(row: Row) -> bool:
    """Slurm keeps a record even of what it refused at once."""
    return row.word == "FAILED" and row.host is None


def _ours(row: Row) -> bool:
    """Whether its comment says so; the accounting may not keep comments, but always the name."""
    return row.comment is None or row.comment == MARK + row.name


def _seen(row: Row) -> Seen:
    state = state_of(row.word, row.restarts)
    ran = state in (State.succeeded, State.failed)
    return Seen(state, row.word, row.reason, row.exit_code if ran else None, row.host)
