"""Places of this machine: GPUs by index, and slots for jobs without one. A place is a locked file.

Whoever runs jobs on this machine, from whatever workspace, locks the same files; the kernel gives a place to one job,
and frees it when the job's last process that holds it is gone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import BackendError
from toolkit.launch.locks import take
from toolkit.launch.spec import Resources

if TYPE_CHECKING:
    from toolkit.launch.local.section import LocalSection

FOLDER = "/tmp/toolkit-places"  # noqa: S108 - one for the whole machine, as /var/lock is not in every container
CORES_OF_A_SLOT = 4


@dataclass(frozen=True)
class Taken:
    """Places of one job: hand the descriptors to its process, then close them here."""

    descriptors: tuple[int, ...]
    gpus: tuple[int, ...]

    def close(self) -> None:
        """Let go; what was handed down keeps the places."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class Places:
    """What this machine has."""

    def __init__(self, section: LocalSection) -> None:
        self.gpus = section.gpus if section.gpus is not None else found_gpus()
        self.slots = section.slots or max(1, (os.cpu_count() or 1) // CORES_OF_A_SLOT)
        self.folder = Path(os.environ.get("TOOLKIT_PLACES") or section.folder or FOLDER)

    def take(self, wanted: Resources) -> Taken | None:
        """Places for a job; ``None`` while there are not enough.

        Raises:
            BackendError: There will never be enough.
        """
        if wanted.gpus > len(self.gpus):
            raise BackendError(
                f"it asks for {wanted.gpus} GPUs, and this machine has {len(self.gpus)} for jobs",
                "mend resources in the profile, or local.gpus",
            )
        if wanted.gpus == 0:
            got = self._locked("slot", tuple(range(self.slots)), 1)
            return None if got is None else Taken(tuple(got.values()), ())
        got = self._locked("gpu", self.gpus, wanted.gpus)
        return None if got is None else Taken(tuple(got.values()), tuple(got))

    def _locked(self, kind: str, indexes: tuple[int, ...], count: int) -> dict[int, int] | None:
        """Locked files by index; all that are wanted, or none."""
        got: dict[int, int] = {}
        for index in indexes:
            descriptor = _opened(self._file(kind, index))
            if take(descriptor):
                got[index] = descriptor
            else:
                os.close(descriptor)
            if len(got) == count:
                return got
        for descriptor in got.values():
            os.close(descriptor)
        return None

    def _file(self, kind: str, index: int) -> Path:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(PermissionError):  # somebody else made it
                self.folder.chmod(0o1777)
        return self.folder / f"{kind}-{index}"


def _opened(path: Path) -> int:
    """Open a place's file for its lock; another user may have made it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def found_gpus() -> tuple[int, ...]:
    """Indexes of the GPUs that this process may use."""
    from toolkit.preflight.gpu import ask_driver

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(int(one) for one in given.split(",") if one.strip().isdigit())
    facts = ask_driver()
    return tuple(range(facts.count)) if facts else ()
