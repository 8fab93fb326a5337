"""Slurm's own programs, asked with a deadline; what they refuse comes back in their words."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.errors import BackendError, NotInstalledError

CARRIED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|SLURM_CONF|SLURM_JWT|MUNGE_\w+|BASH_ENV|KRB5CCNAME"
    r"|MODULEPATH|MODULESHOME|MODULES_\w+|LMOD_\w+|LUA_PATH|BASH_FUNC_\w+%%"
)
"""What goes from the submitter's environment into a job: no options for sbatch, no secrets, nothing of another job."""

_FIELDS = (
    "JobArrayID",
    "Name",
    "State",
    "Reason",
    "exit_code",
    "RestartCnt",
    "BatchHost",
    "Comment",
)
LAST_SIGNAL = 31
_MISSING = "Invalid job id"
_NO_ACCOUNTING = ("accounting storage is disabled", "accounting_storage/none")
_MANY = 2000
"""Numbers or names of jobs that fit into one argument."""


@dataclass(frozen=True)
class Row:
    """One job, or one task of an array, in Slurm's words."""

    number: str
    """``17``, or ``17_3``."""
    name: str
    word: str
    reason: str | None
    exit_code: int | None
    restarts: int
    host: str | None
    comment: str | None
    """``None``: the accounting does not keep it."""


@dataclass(frozen=True)
class Client:
    """Calls of sbatch, squeue, sacct and scancel.

    Args:
        timeout_s: How long each may take, seconds.
    """

    timeout_s: float = 60

    def sbatch(self, script: str, folder: Path) -> str:
        """Hand a script over; its job's number.

        Raises:
            BackendError: Slurm refuses it, or does not answer.
            NotInstalledError: There is no sbatch.
        """
        told = self._ask("sbatch", "--parsable", f"--chdir={folder}", given=script, folder=folder)
        found = re.findall(r"^(\d+)(?:;\S+)?$", told, re.MULTILINE)
        if not found:
            raise BackendError(f"sbatch answered without a job's number: {told.strip()!r}")
        return str(found[-1])

    def queue(self, numbers: Sequence[str]) -> list[Row]:
        """What slurmctld knows of these jobs; those that it forgot are left out. One call."""
        return [row for some in _parts(numbers) for row in self._squeue(f"--jobs={','.join(some)}")]

    def named(self, names: Sequence[str]) -> list[Row]:
        """Own jobs of some names that slurmctld knows, the newest last."""
        user = f"--user={os.getuid()}"
        rows = [
            row for some in _parts(names) for row in self._squeue(f"--name={','.join(some)}", user)
        ]
        return sorted(rows, key=lambda row: int(row.number.partition("_")[0]))

    def _squeue(self, *which: str) -> list[Row]:
        form = ",".join(f"{name}:|" for name in _FIELDS)
        try:
            told = self._ask(
                "squeue", "--noheader", "--array", "--states=all", f"--Format={form}", *which
            )
        except BackendError as error:
            if _MISSING in error.message:  # the only one asked for is forgotten
                return []
            raise
        return [_row(line) for line in told.splitlines() if line.strip()]

    def accounting(self, numbers: Sequence[str]) -> list[Row]:
        """What the accounting kept of these jobs; nothing where the cluster has none.

        What it calls waiting is left out: if slurmctld does not know such a job, nothing waits.
        """
        rows: dict[tuple[str, str], Row] = {}
        # tasks that never began share their array's line, which is found by the array's number alone
        for some in _parts(list(dict.fromkeys(one.partition("_")[0] for one in numbers))):
            kept = map(_kept, self._sacct(f"--jobs={','.join(some)}"))
            for row in sorted(
                kept, key=lambda row: "[" not in row.number
            ):  # own lines come last, and win
                own = [replace(row, number=one) for one in expanded(row.number)]
                rows |= {(one.number, one.name): one for one in own if row.word != "PENDING"}
        asked = set(numbers)
        return [row for row in rows.values() if row.number in asked]

    def _sacct(self, which: str) -> list[str]:
        fields = "--format=JobID,JobName,State,ExitCode,NodeList"
        try:
            told = self._ask("sacct", "--noheader", "--parsable2", "--allocations", fields, which)
        except NotInstalledError:
            return []
        except BackendError as error:
            if any(one in error.message for one in _NO_ACCOUNTING):
                return []
            raise
        return [line for line in told.splitlines() if line.strip()]

    def scancel(self, numbers: Sequence[str]) -> None:
        """End jobs with everything they started; unknown and ended ones are left alone."""
        for some in _parts(numbers):
            try:
                self._ask("scancel", *some)
            except BackendError as error:
                if _MISSING not in error.message and "already complet" not in error.message:
                    raise

    def requeue(self, number: str) -> None:
        """End a job and let it wait for another start."""
        self._ask("scontrol", "requeue", number)

    def _ask(self, *argv: str, given: str = "", folder: Path | None = None) -> str:
        """Output of a program.

        Raises:
            BackendError: It fails or takes too long.
            NotInstalledError: It is not there.
        """
        try:
            done = subprocess.run(
                argv,
                input=given,
                capture_output=True,
                text=True,
                timeout=self.timeout_s,
                env=carried(os.environ),
                cwd=folder,
                check=False,
            )
        except FileNotFoundError as error:
            if folder and not folder.is_dir():
                raise BackendError(f"the job's folder {folder} is not there") from error
            raise NotInstalledError(
                f"there is no {argv[0]} on PATH: Slurm is not installed here",
                "run this on a login node of the cluster, or load its module first",
            ) from None
        except subprocess.TimeoutExpired:
            raise BackendError(
                f"{argv[0]} gave no answer within {self.timeout_s:g} s",
                "slurmctld is down or busy (scontrol ping); nothing is lost: run the command again",
            ) from None
        if done.returncode:
            raise BackendError(
                f"{argv[0]}: {_said(done.stderr) or f'exit code {done.returncode}'}",
                _hint(done.stderr),
            )
        return done.stdout


def carried(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that Slurm's programs, and through sbatch the jobs, get of the submitter's."""
    return {name: value for name, value in environ.items() if CARRIED.fullmatch(name)}


def _parts(numbers: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(numbers), _MANY):
        yield numbers[start : start + _MANY]


def _row(line: str) -> Row:
    number, name, word, reason, exit_code, restarts, host, comment = line.split("|")[: len(_FIELDS)]
    return Row(
        number=number,
        name=name,
        word=word,
        reason=None if reason in ("None", "") else reason,
        exit_code=_exit_code(exit_code),
        restarts=int(restarts or 0),
        host=_given(host),
        comment=comment,
    )


def _kept(line: str) -> Row:
    number, name, word, exit_code, host = line.split("|")
    reason = word if " by " in word else None
    return Row(number, name, word, reason, _exit_code(exit_code), 0, _given(host), None)


def expanded(numbers: str) -> list[str]:
    """All that ``17_[3,5-9%2]`` stands for."""
    job, open_, tasks = numbers.partition("_[")
    if not open_:
        return [numbers]
    found: list[int] = []
    for some in tasks.partition("]")[0].partition("%")[0].split(","):
        first, _, rest = some.partition("-")
        last, _, step = rest.partition(":")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return [f"{job}_{task}" for task in found]


def _given(value: str) -> str | None:
    return None if value in ("", "n/a", "N/A", "(null)", "None assigned") else value


def _exit_code(text: str) -> int | None:
    """Of ``3:0`` (code and signal), or of the raw status that squeue prints; negative for a signal.

    ``0:53`` is Slurm's own word for a program that it could not start.
    """
    code, _, number = text.partition(":")
    if not code.isdigit():
        return None
    status = int(code) << 8 | int(number) if number else int(code)
    found = os.waitstatus_to_exitcode(status)
    return found if found >= -LAST_SIGNAL else None


def _said(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(
        re.sub(r"^(sbatch|squeue|sacct|scancel): (error: )?", "", line) for line in lines[-5:]
    )


_HINTS = {
    "Invalid account": "give `slurm: {account: ...}` in the profile: sacctmgr show associations user=$USER",
    "Invalid partition": "give `slurm: {partition: ...}` in the profile: sinfo -s shows what there is",
    "invalid partition": "give `slurm: {partition: ...}` in the profile: sinfo -s shows what there is",
    "Invalid qos": "give `slurm: {qos: ...}` in the profile: sacctmgr show qos",
    "generic resource": "`slurm: {gres: ..., gpu_type: ...}` of the profile must be what `sinfo -o %G` shows",
    "Requested node configuration is not available": "no node has so much: sinfo -o '%P %c %m %G'",
    "Unable to contact slurm controller": "scontrol ping; nothing is lost: run the command again",
    "Invalid job array specification": "more at once than MaxArraySize of `scontrol show config` allows: fewer trials",
    "Job dependency problem": "a job that this one comes after is forgotten or failed: toolkit jobs show",
}


def _hint(text: str) -> str | None:
    return next((hint for part, hint in _HINTS.items() if part in text), None)
