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

from toolkit.errors import BackendError
from toolkit.launch.kubernetes import names
from toolkit.launch.kubernetes.client import Cluster, Refused
from toolkit.launch.kubernetes.render import manifest
from toolkit.launch.kubernetes.section import KubernetesSection
from toolkit.launch.kubernetes.seen import condition, seen
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import Seen

CANCEL_S = 20
"""Between SIGTERM and SIGKILL of a cancelled job, seconds: a checkpoint nobody asked for is not waited for."""
NAMED_AT_MOST = 50
"""So many objects are asked for by name; of more, all of ours in the namespace: an address has its limits."""


class Kubernetes:
    """See :class:`toolkit.launch.backend.Backend`. Engine ids are ``job/NAME`` and ``jobset/NAME``, as for kubectl."""

    name: ClassVar[str] = "kubernetes"
    ordered: ClassVar[bool] = False

    def __init__(self, options: KubernetesSection | None, folder: Path) -> None:
        self.section = options or KubernetesSection()
        self.folder = folder

    @cached_property
    def cluster(self) -> Cluster:
        """The way there; reads the configuration once."""
        return Cluster.connect(self.section)

    def render(self, job: JobSpec, after: Mapping[str, str]) -> str:  # noqa: ARG002
        """The manifest of the first start; later ones differ in their name and the label ``toolkit/try``."""
        return manifest(job, self.section)

    def submit(self, job: JobSpec, after: Mapping[str, str]) -> str:  # noqa: ARG002
        """Create the object, unless one of this job waits, runs or succeeded."""
        kind = "jobset" if job.resources.nodes > 1 else "job"
        number = 1
        while True:
            name = names.object_name(job.id, number, several=kind == "jobset")
            try:
                self.cluster.create(kind, manifest(job, self.section, number))
            except Refused as error:
                if error.status != 409:
                    raise
            else:
                return f"{kind}/{name}"
            # It is there: from a submitter that was killed before it wrote that down, or from an earlier start.
            last = self._last(kind, job, name)
            if last and not condition(last, "Failed") and not _leaves(last):
                return f"{kind}/{last['metadata']['name']}"
            number = _number(last) + 1 if last else number

    def _last(self, kind: str, job: JobSpec, name: str) -> dict[str, Any] | None:
        """The newest object of this job; ``None`` when there is none any more.

        Raises:
            BackendError: The name is taken by somebody else's object.
        """
        found = self.cluster.list(kind, f"{names.OBJECT},{names.JOB}={names.label(job.id)}")
        ours = [
            one
            for one in found
            if one["metadata"]["name"] == one["metadata"]["labels"][names.OBJECT]
        ]
        taken = self.cluster.find(kind, name)
        if taken and name not in {one["metadata"]["name"] for one in ours}:
            raise BackendError(
                f"{kind} {name} is there already and is not the toolkit's",
                f"kubectl describe {kind}/{name}; another kubernetes.namespace keeps them apart",
            )
        return max(ours, key=_number, default=None)

    def seen(self, ids: Sequence[str]) -> Mapping[str, Seen]:
        """One list of Jobs and one of pods, however many are asked for; one of JobSets where there are any."""
        if not ids:
            return {}
        # Pods are read first: a Job that ends in between is then seen with its pods still running, never without them.
        pods = self._pods(_selector(ids))
        return {
            one: seen(given, pods.get(names.split(one)[1], ()))
            for one, given in self._objects(ids).items()
        }

    def _objects(self, ids: Sequence[str]) -> Mapping[str, dict[str, Any]]:
        """The Jobs and JobSets of these ids that are there."""
        wanted = set(ids)
        return {
            engine_id: one
            for kind in sorted({names.split(one)[0] for one in ids})
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

    def logs(self, job: JobSpec, engine_id: str) -> Iterator[str] | None:  # noqa: ARG002
        """Lines of its pods, the first node's first; ``None`` where the workspace is shared: its folder has them."""
        if self.section.shared:
            return None
        return self._lines(engine_id)

    def _lines(self, engine_id: str) -> Iterator[str]:
        found = self._pods(_selector([engine_id])).get(names.split(engine_id)[1], [])
        for pod in sorted(found, key=lambda one: str(one["metadata"]["name"])):
            if pod["status"].get("phase") != "Pending":
                yield from self.cluster.log(pod["metadata"]["name"], follow=len(found) == 1)


def _selector(ids: Sequence[str]) -> str:
    managed = ",".join(f"{key}={value}" for key, value in names.MANAGED.items())
    if len(ids) > NAMED_AT_MOST:
        return managed
    return f"{managed},{names.OBJECT} in ({','.join(names.split(one)[1] for one in ids)})"


def _number(given: Mapping[str, Any]) -> int:
    return int(given["metadata"]["labels"][names.TRY])


def _leaves(given: Mapping[str, Any]) -> bool:
    """Whether somebody deleted it."""
    return bool(given["metadata"].get("deletionTimestamp"))


def _ended(given: Mapping[str, Any]) -> bool:
    return any(condition(given, kind) for kind in ("Complete", "Completed", "Failed"))
