"""Jobs on a Ray cluster.

Not ordered: Ray holds no job back until another succeeded and starts none again, so the keeper does both. An engine id
is Ray's submission id, which is our id; a start over adds ``-r2``, because Ray takes no id twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from toolkit.errors import BackendError
from toolkit.launch.folder import JobFolder
from toolkit.launch.ray.client import Head, Refused
from toolkit.launch.ray.render import request, submission_id
from toolkit.launch.ray.section import RaySection
from toolkit.launch.ray.seen import GAVE_UP, STATUSES, seen
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Seen, translate


class Ray:
    """See :class:`toolkit.launch.backend.Backend`."""

    name: ClassVar[str] = "ray"
    ordered: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any], folder: Path) -> None:
        self.section = RaySection.model_validate(options)
        self.head = Head(self.section)
        self.folder = folder

    def render(self, job: JobSpec, after: Mapping[str, str]) -> str:  # noqa: ARG002
        """The body of the request for the start that comes next, as JSON."""
        return request(job, self.section, _coming(job))

    def submit(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """Submit the job, unless this start of it is there; one that Ray gave up on for want of room is made anew."""
        name = submission_id(job, _coming(job))
        there = self.head.find(name)
        if there is not None:
            _check_ours(name, there, job)
            if there.get("error_type") != GAVE_UP:
                return name
            self.head.forget(name)
        try:
            self.head.create(self.render(job, after))
        except Refused:
            if self.head.find(name) is None:
                raise
        return name

    def seen(self, ids: Sequence[str]) -> Mapping[str, Seen]:
        """One list of the cluster's jobs, however many are asked for."""
        if not ids:
            return {}
        found = self.head.list()
        return {one: seen(found[one]) for one in ids if one in found}

    def cancel(self, ids: Sequence[str]) -> None:
        """Stop those that have not ended."""
        if not ids:
            return
        found = self.head.list()
        for one in ids:
            if one in found and not translate("Ray", STATUSES, found[one]["status"]).ended:
                self.head.stop(one)

    def logs(self, job: JobSpec, engine_id: str) -> Iterator[str] | None:
        """What Ray kept of a job that ended before its own log began; ``None``: its folder has the log."""
        if any(attempt.log().exists() for attempt in JobFolder(Path(job.folder)).attempts):
            return None
        there = self.head.find(engine_id)
        if there is None or not translate("Ray", STATUSES, there["status"]).ended:
            return None
        return iter(self.head.log(engine_id).splitlines())


def _coming(job: JobSpec) -> int:
    return JobFolder(Path(job.folder)).coming


def _check_ours(name: str, there: Mapping[str, Any], job: JobSpec) -> None:
    if (there.get("metadata") or {}).get("toolkit.job") != job.id:
        raise BackendError(
            f"Ray has a job {name} already, and it is not the toolkit's",
            f"ray job delete {name}, when it is not needed any more",
        )
