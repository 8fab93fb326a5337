"""Jobs in a cluster.

Not ordered: nothing in Kubernetes holds a Job back until another succeeded, so the keeper does. A start is one object,
and a start over another one (``NAME-r2``), so that what the first one said stays readable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from toolkit.errors import BackendError, NoPlaceError
from toolkit.launch.folder import JobFolder
from toolkit.launch.kubernetes import names
from toolkit.launch.kubernetes.client import Cluster, Refused
from toolkit.launch.kubernetes.render import manifest
from toolkit.launch.kubernetes.section import KubernetesSection
from toolkit.launch.kubernetes.seen import condition, seen
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Seen

CANCEL_S = 20
"""Between SIGTERM and SIGKILL of a cancelled job, seconds: a checkpoint nobody asked for is not waited for."""
ASKED_AGAIN = 3
"""How often an object is made again that was there and is gone a moment later."""
NAMED_AT_MOST = 50
"""So many objects are asked for by name; of more, all of ours in the namespace: an address has its limits."""


class Kubernetes:
    """See :class:`toolkit.launch.backend.Backend`. Engine ids are ``job/NAME`` and ``jobset/NAME``, as for kubectl."""

    name: ClassVar[str] = "kubernetes"
    ordered: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any], folder: Path) -> None:
        self.section = KubernetesSection.model_validate(options)
        self.folder = folder

    @cached_property
    def cluster(self) -> Cluster:
        """The way there; reads the configuration once."""
        return Cluster.connect(self.section)

    def render(self, job: JobSpec, after: Mapping[str, str]) -> str:  # noqa: ARG002
        """The manifest of the start that comes next; starts differ in their name and the label ``toolkit/try``."""
        return manifest(job, self.section, _coming(job))

    def submit(self, job: JobSpec, after: Mapping[str, str]) -> str:
        """Create the object, unless this start of this job is there."""
        kind = "jobset" if job.resources.nodes > 1 else "job"
        name = names.object_name(job.id, _coming(job), several=kind == "jobset")
        for _ in range(ASKED_AGAIN):
            try:
                self.cluster.create(kind, self.render(job, after))
            except Refused as error:
                if error.status != 409:
                    raise
            else:
                return f"{kind}/{name}"
            # It is there: from a submitter that was killed before it wrote that down, or somebody else's.
            there = self.cluster.find(kind, name)
            if there is not None:
                _check_ours(kind, there, job)
                return f"{kind}/{name}"
        raise NoPlaceError(f"{kind} {name} is there and is not, by turns")

    def seen(self, ids: Sequence[str]) -> Mapping[str, Seen]:
        """One list of Jobs and one of pods, however many are asked for; one of JobSets where there are any."""
        if not ids:
            return {}
        # Pods are read first: a Job that ends in between is then seen with its pods still running, never without them.
        pods = self._pods(_selector(ids))
        return {
            one: seen(given, pods.get(names.split(one)[1], ()), self.section.start_timeout_s)
            for one, given in self._objects(ids).items()
        }

    def _objects(self, ids: Sequence[str]) -> Mapping[str, dict[str, Any]]:
        """The Jobs and JobSets of these ids that are there."""
        wanted = set(ids)
        return {
            engine_id: one
            for kind in sorted({names.split(one)[0] for one in ids} & {"job", "jobset"})
            for one in self.cluster.list(kind, _selector(ids))
            if (engine_id := f"{kind}/{one['metadata']['name']}") in wanted
        }

    def _pods(self, selector: str) -> Mapping[str, list[dict[str, Any]]]:
        """Pods by the name of the object that they belong to."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for pod in self.cluster.list("pod", selector):
            found[pod["metadata"]["labels"].get(names.OBJECT, "")].append(pod)
        return found

    def cancel(self, ids: Sequence[str]) -> None:
        """Delete objects that have not ended, then hurry their pods."""
        if not ids:
            return
        going = [one for one, given in self._objects(ids).items() if not _ended(given)]
        for one in going:
            self.cluster.delete(*names.split(one))
        if going:
            pods = self._pods(_selector(going))
            for one in going:
                for pod in pods.get(names.split(one)[1], ()):
                    self.cluster.delete_pod(pod["metadata"]["name"], CANCEL_S)

    def logs(self, job: JobSpec, engine_id: str) -> Iterator[str] | None:
        """What its pods said, where they ended before the job's own log began; ``None``: its folder has the log."""
        if any(attempt.log().exists() for attempt in JobFolder(Path(job.folder)).attempts):
            return None
        found = self._pods(_selector([engine_id])).get(names.split(engine_id)[1], [])
        ended = [pod for pod in found if pod["status"].get("phase") in ("Succeeded", "Failed")]
        return self._lines(ended) if ended else None

    def _lines(self, pods: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        for name in sorted(str(pod["metadata"]["name"]) for pod in pods):
            yield from self.cluster.log(name)


def _coming(job: JobSpec) -> int:
    return JobFolder(Path(job.folder)).coming


def _check_ours(kind: str, there: Mapping[str, Any], job: JobSpec) -> None:
    """Whether an object that has our name is this job's, and stays.

    Raises:
        BackendError: It is not.
        NoPlaceError: It is being deleted.
    """
    name, metadata = there["metadata"]["name"], there["metadata"]
    if (metadata.get("labels") or {}).get(names.JOB) != names.label(job.id):
        raise BackendError(
            f"{kind} {name} is there already and is not the toolkit's",
            f"kubectl describe {kind}/{name}; another kubernetes.namespace keeps them apart",
        )
    if metadata.get("deletionTimestamp"):
        raise NoPlaceError(f"{kind} {name} is being deleted; its pods use their grace")


def _selector(ids: Sequence[str]) -> str:
    managed = ",".join(f"{key}={value}" for key, value in names.MANAGED.items())
    if len(ids) > NAMED_AT_MOST:
        return managed
    return f"{managed},{names.OBJECT} in ({','.join(names.split(one)[1] for one in ids)})"


def _ended(given: Mapping[str, Any]) -> bool:
    return any(condition(given, kind) for kind in ("Complete", "Completed", "Failed"))
