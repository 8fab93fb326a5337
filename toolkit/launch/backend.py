"""What an engine must be able to do for jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Seen
from toolkit.registry import Registry


class Backend(Protocol):
    """A place where jobs run. ``render`` is pure and the whole truth; ``submit`` sends exactly that.

    Made as ``Backend(options, folder)``: the profile's section for it, and the workspace's ``jobs`` folder.
    """

    name: ClassVar[str]
    ordered: ClassVar[bool]
    """Whether the engine itself keeps a job back until those in ``after`` succeeded, and starts it again when it is
    preempted or its node is lost (Slurm). Where it does not, the keeper (``keeper.py``) does both."""

    def render(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """What is submitted: a batch script, a manifest, a request as JSON.

        Args:
            job: The job.
            after: Engine ids of the jobs it comes after, by our ids; a dry run gives placeholders.
        """
        ...

    def submit(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """Hand it over; the engine's id. With an id of ours that the engine has already, that job's id: no second one.

        An unordered engine gets a job again after an attempt ended; ``JobFolder.coming`` numbers the starts, so
        ``<id>-<coming>`` is a name that is new for a new start and known for one that was handed over.

        Raises:
            NoPlaceError: Not just now; it is asked again.
            BackendError: The engine is not there, or refuses; in its words.
        """
        ...

    def seen(self, ids: Sequence[str]) -> Mapping[str, Seen]:
        """What the engine knows of these (engine ids), in one call; those it has forgotten are left out.

        Raises:
            BackendError: The engine does not answer.
            UnknownStateError: It uses a word that is in no table of ours.
        """
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """End them with everything they started, within the grace; those that ended already are left alone.

        Raises:
            BackendError: The engine does not answer.
        """
        ...

    def logs(self, job: JobSpec, engine_id: str) -> Iterator[str] | None:
        """Lines from the engine, where the job's folder cannot be read from here; ``None``: read the folder."""
        ...


BACKENDS = Registry(
    "backend",
    {
        "local": "toolkit.launch.local:Local",
        "slurm": "toolkit.launch.slurm:Slurm",
        "ray": "toolkit.launch.ray.backend:Ray",
        "kubernetes": "toolkit.launch.kubernetes.backend:Kubernetes",
    },
)
"""Backend classes by the name that a profile gives."""


def backend_of(name: str, options: Mapping[str, Any], jobs: Path) -> Backend:
    """An engine by a profile's name for it.

    Args:
        name: The backend's name.
        options: The profile's section for it.
        jobs: The workspace's ``jobs`` folder.

    Raises:
        NotInstalledError: Its client is not installed.
    """
    made: Backend = BACKENDS[name](options, jobs)
    return made
