"""From a job to the one object that the cluster is given. Pure.

One node is a plain ``batch/v1`` Job; several are a JobSet, whose pods find the first of them by a name that does not
change. Nothing is started again by the cluster: every end is final there (``backoffLimit: 0``), and the keeper decides
by its cause. What the cluster takes away (preemption, drained nodes) it marks with ``DisruptionTarget``; that and exit
code 75 are told apart by ``podFailurePolicy``, so that the Job's own message tells them after its pod is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from toolkit.errors import UsageError
from toolkit.handover.manifest import dump
from toolkit.handover.pods import CONTAINER_SECURITY, POD_SECURITY
from toolkit.launch.kubernetes import names
from toolkit.launch.kubernetes.section import KubernetesSection, VolumeSection
from toolkit.launch.spec import JobSpec
from toolkit.launch.states import PREEMPTED
from toolkit.train.parallel.launch import NODE

HOME = "/home/toolkit"
WRITABLE = ("/tmp", HOME)  # noqa: S108 - folders of the pod alone, on a root that is read-only
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
START = "metadata.labels['batch.kubernetes.io/controller-uid']"
"""Equal on all nodes of one start: their Job's own id."""
STOP_S = 15
"""What the shim needs after the grace to write down how it ended, seconds."""
START_S = 1800
"""A pod whose node is known may take so long to fetch its image; only counted where there is a time limit."""


def manifest(job: JobSpec, section: KubernetesSection, number: int = 1) -> str:
    """The object as YAML, byte for byte what is sent.

    Args:
        job: The job.
        section: The cluster.
        number: Which start of this job it is, from 1.

    Raises:
        UsageError: The profile lacks an image, no volume holds the job's folder, or a secret has no key.
    """
    several = job.resources.nodes > 1
    name = names.object_name(job.id, number, several=several)
    marks = {**section.labels, **_labels(job, name, number)}
    template = _job_spec(job, section, marks, name)
    queue = {"kueue.x-k8s.io/queue-name": section.queue} if section.queue else {}
    metadata: dict[str, Any] = {"name": name}
    if section.namespace:
        metadata["namespace"] = section.namespace
    metadata |= {"labels": marks | queue, "annotations": {"toolkit/step": job.step}}
    if several:
        return dump(_job_set(metadata, template, marks, section))
    spec = {**template, "ttlSecondsAfterFinished": section.keep_s}
    return dump({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec})


def _labels(job: JobSpec, name: str, number: int) -> dict[str, str]:
    return {
        **names.MANAGED,
        names.JOB: names.label(job.id),
        names.CHAIN: names.label(job.chain),
        names.STAGE: names.label(job.stage),
        names.OBJECT: name,
        names.TRY: str(number),
    }


def _job_set(
    metadata: Mapping[str, Any],
    template: Mapping[str, Any],
    marks: Mapping[str, str],
    section: KubernetesSection,
) -> dict[str, Any]:
    group = {
        "name": names.GROUP,
        "replicas": 1,
        "template": {"metadata": {"labels": dict(marks)}, "spec": template},
    }
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": metadata["name"]},
        # One node that fails ends them all: their training is one.
        "failurePolicy": {"maxRestarts": 0},
        "ttlSecondsAfterFinished": section.keep_s,
        "replicatedJobs": [group],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": spec,
    }


def _job_spec(
    job: JobSpec, section: KubernetesSection, marks: Mapping[str, str], name: str
) -> dict[str, Any]:
    spec: dict[str, Any] = {"backoffLimit": 0, "podReplacementPolicy": "Failed"}
    if job.resources.nodes > 1:
        count = job.resources.nodes
        spec |= {"completionMode": "Indexed", "completions": count, "parallelism": count}
    codes = {"containerName": names.CONTAINER, "operator": "In", "values": [PREEMPTED]}
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    spec["podFailurePolicy"] = {
        "rules": [
            {"action": "FailJob", "onExitCodes": codes},
            {"action": "FailJob", "onPodConditions": disrupted},
        ]
    }
    metadata: dict[str, Any] = {"labels": dict(marks)}
    if section.annotations:
        metadata["annotations"] = dict(section.annotations)
    spec["template"] = {"metadata": metadata, "spec": _pod(job, section, name)}
    return spec


def _pod(job: JobSpec, section: KubernetesSection, name: str) -> dict[str, Any]:
    volumes, mounts = _storage(job, section)
    own = {"runAsUser": section.user, "runAsGroup": section.group, "fsGroup": section.group}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": job.grace_s + STOP_S,
        # Ownership of a volume with a million files is not changed again at every start.
        "securityContext": {**POD_SECURITY, **own, "fsGroupChangePolicy": "OnRootMismatch"},
    }
    if job.resources.time_limit_s:
        # The shim keeps the limit itself; this is for a pod that hangs before or beneath it.
        pod["activeDeadlineSeconds"] = job.resources.time_limit_s + START_S + job.grace_s
    pod |= _placement(section)
    container: dict[str, Any] = {
        "name": names.CONTAINER,
        "image": _image(job, section),
        "command": [literal(word) for word in job.argv],
        "env": _variables(job, section, name),
        "resources": _resources(job, section),
        "securityContext": {**CONTAINER_SECURITY, "readOnlyRootFilesystem": True},
        "volumeMounts": mounts,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if section.pull_policy:
        container["imagePullPolicy"] = section.pull_policy
    return {**pod, "containers": [container], "volumes": volumes}


def _placement(section: KubernetesSection) -> dict[str, Any]:
    """Where the pod may run, and whose it is there."""
    tolerations = [one.model_dump(exclude_none=True) for one in section.tolerations]
    given: dict[str, Any] = {
        "serviceAccountName": section.service_account,
        "priorityClassName": section.priority_class,
        "runtimeClassName": section.runtime_class,
        "nodeSelector": dict(section.node_selector),
        "tolerations": tolerations,
        "imagePullSecrets": [{"name": name} for name in section.pull_secrets],
    }
    return {key: value for key, value in given.items() if value}


def _image(job: JobSpec, section: KubernetesSection) -> str:
    image = section.images.get(job.stage, section.image)
    if image is None:
        raise UsageError(
            "the profile names no image for its pods",
            "add kubernetes.image to it: an image with the profile's `python`, best by its digest",
        )
    return image


def literal(text: str) -> str:
    """``text`` so that it arrives as it is: kubelets replace ``$(NAME)`` in commands and variables, ``$$`` by ``$``."""
    return text.replace("$", "$$")


def _variables(job: JobSpec, section: KubernetesSection, name: str) -> list[dict[str, Any]]:
    several = job.resources.nodes > 1
    engine_id = f"{'jobset' if several else 'job'}/{name}"
    given = {"HOME": HOME, "TOOLKIT_ENGINE_ID": engine_id, **job.env}
    found: list[dict[str, Any]] = [
        {"name": key, "value": literal(value)} for key, value in sorted(given.items())
    ]
    found.append({"name": "TOOLKIT_START", "valueFrom": {"fieldRef": {"fieldPath": START}}})
    if several:
        first = f"{name}-{names.GROUP}-0-0.{name}:{section.port}"
        found.append({"name": "TOOLKIT_RENDEZVOUS", "value": first})
        found.append({"name": NODE, "valueFrom": {"fieldRef": {"fieldPath": INDEX}}})
    for variable, place in sorted(job.secrets.items()):
        secret, _, key = place.partition("/")
        if not (names.NAME.fullmatch(secret) and key):
            raise UsageError(
                f"the profile's secret {variable} is at {place!r}, which names no key of a Secret",
                f"write secrets: {{{variable}: NAME-OF-SECRET/KEY}}",
            )
        source = {"secretKeyRef": {"name": secret, "key": key}}
        found.append({"name": variable, "valueFrom": source})
    return found


def _resources(job: JobSpec, section: KubernetesSection) -> dict[str, Any]:
    """Cores are asked for and not capped; memory and GPUs are both."""
    taken, asked = job.resources, {"cpu": str(job.resources.cpus)}
    limits: dict[str, str] = {}
    if taken.memory_gib:
        limits["memory"] = f"{round(taken.memory_gib * 1024)}Mi"
    if taken.gpus:
        limits[section.gpu] = str(taken.gpus)
    return {"requests": asked | limits} | ({"limits": limits} if limits else {})


def _storage(
    job: JobSpec, section: KubernetesSection
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts): the profile's, then what every pod has for itself."""
    folder = PurePosixPath(job.folder)
    if not any(folder.is_relative_to(one.path) for one in section.volumes if one.lasts):
        known = ", ".join(one.path for one in section.volumes if one.lasts) or "none"
        raise UsageError(
            f"no volume of the profile holds the workspace: {folder} (volumes that last: {known})",
            "mount its volume under the path that it has here (kubernetes.volumes), or give --workspace below one",
        )
    size = f"{round(section.shared_memory_gib * 1024)}Mi"
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for number, one in enumerate(section.volumes):
        volumes.append({"name": f"volume-{number}", **_source(one)})
        mount = {"name": f"volume-{number}", "mountPath": one.path, "subPath": one.sub_path}
        mounts.append({key: value for key, value in mount.items() if value is not None})
        if one.read_only:
            mounts[-1]["readOnly"] = True
    for path in WRITABLE:
        name = path.strip("/").replace("/", "-")
        volumes.append({"name": name, "emptyDir": {}})
        mounts.append({"name": name, "mountPath": path})
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 - where Linux has it
    return volumes, mounts


def _source(one: VolumeSection) -> dict[str, Any]:
    if one.claim:
        return {"persistentVolumeClaim": {"claimName": one.claim}}
    if one.nfs:
        server, _, path = one.nfs.partition(":")
        return {"nfs": {"server": server, "path": path}}
    if one.config_map:
        return {"configMap": {"name": one.config_map}}
    return {"emptyDir": {"sizeLimit": f"{round((one.empty_gib or 1) * 1024)}Mi"}}
