"""What a Job and its pods say, in our words. Pure, from the API's objects as plain data.

A Job says little (active, complete, failed); its pods say why. A pod that failed is looked at from the machine's side
first (evicted, preempted, node gone: not the work's fault), then from the program's (out of memory, exit code).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toolkit.launch.kubernetes.stuck import given_up
from toolkit.launch.states import PREEMPTED, Cause, Seen, State, translate

Object = Mapping[str, Any]

JOBS: Mapping[str, State] = {
    "Suspended": State.queued,  # by Kueue, which lets it go when there is room
    "Pending": State.queued,  # no pod yet
    "Terminating": State.running,  # deleted; its pods use their grace
    "Complete": State.succeeded,
    "Completed": State.succeeded,  # a JobSet's word for it
    "Failed": State.failed,
    "BackoffLimitExceeded": State.failed,
    "DeadlineExceeded": State.failed,
    "PodFailurePolicy": State.failed,
    "FailedIndexes": State.failed,
    "MaxFailedIndexesExceeded": State.failed,
    "FailedJobs": State.failed,  # of a JobSet
    "ReachedMaxRestarts": State.failed,  # of a JobSet
    "FailJobSetFailurePolicyAction": State.failed,
}
"""Of Jobs and JobSets: words of ours for what their conditions say, and reasons of their condition ``Failed``."""

WAITS: Mapping[str, State] = {
    "Pending": State.queued,  # not looked at by the scheduler yet
    "Unschedulable": State.queued,
    "SchedulerError": State.queued,
    "SchedulingGated": State.queued,
    "Scheduled": State.starting,
    "PodInitializing": State.starting,
    "ContainerCreating": State.starting,
    # Kubelets try all of these again; what is wrong can be mended meanwhile, until patience ends (stuck.py).
    "ErrImagePull": State.starting,
    "ImagePullBackOff": State.starting,
    "ErrImageNeverPull": State.starting,
    "ImageInspectError": State.starting,
    "InvalidImageName": State.starting,
    "RegistryUnavailable": State.starting,
    "SignatureValidationFailed": State.starting,
    "CreateContainerConfigError": State.starting,
    "CreateContainerError": State.starting,
    "CreatePodSandboxError": State.starting,
    "ConfigPodSandboxError": State.starting,
    "RunContainerError": State.starting,
    "PreStartHookError": State.starting,
}
"""Of pods in phase Pending: reasons of the condition ``PodScheduled`` and of waiting containers."""

PHASES: Mapping[str, State] = {
    "Pending": State.queued,
    "Running": State.running,
    "Unknown": State.running,  # its node does not answer; heartbeats tell more
    "Succeeded": State.succeeded,
    "Failed": State.failed,
}

TAKEN: Mapping[str, Cause] = {
    # Reasons of the condition DisruptionTarget.
    "PreemptionByScheduler": Cause.preempted,
    "PreemptionByKubeScheduler": Cause.preempted,  # before 1.26
    "DeletionByTaintManager": Cause.lost,
    "EvictionByEvictionAPI": Cause.preempted,
    "DeletionByPodGC": Cause.lost,
    "TerminationByKubelet": Cause.preempted,
    # Reasons of the pod itself, given by its kubelet.
    "Evicted": Cause.preempted,
    "Preempting": Cause.preempted,
    "Preempted": Cause.preempted,
    "NodeLost": Cause.lost,
    "NodeShutdown": Cause.lost,
    "Shutdown": Cause.lost,
    "Terminated": Cause.lost,  # the node shut down in order
    "NodeAffinity": Cause.lost,  # refused by the node that it was meant for: another one may take it
    "UnexpectedAdmissionError": Cause.lost,
    "OutOfcpu": Cause.lost,
    "OutOfmemory": Cause.lost,
    "OutOfpods": Cause.lost,
    "DeadlineExceeded": Cause.time_limit,
}
"""Why a pod was ended that did nothing wrong (but for its time limit)."""

ENDS: Mapping[str, Cause] = {
    "Completed": Cause.done,
    "Error": Cause.failed,
    "OOMKilled": Cause.out_of_memory,
    "ContainerStatusUnknown": Cause.lost,
    "Unknown": Cause.lost,  # the node started again, and nothing knows how it ended
    "ContainerCannotRun": Cause.not_installed,
    "StartError": Cause.not_installed,  # the command is not in the image
    "DeadlineExceeded": Cause.time_limit,
}
"""Reasons of terminated containers."""

CODES = {PREEMPTED: Cause.preempted, 2: Cause.usage, 3: Cause.not_installed}
"""What our exit codes mean, where the reason is no more than ``Error``."""

_EXIT = re.compile(r"failed with exit code (\d+)")


def seen(job: Object, pods: Sequence[Object], start_timeout_s: float = math.inf) -> Seen:
    """One Job or JobSet with its pods.

    Args:
        job: The Job or JobSet.
        pods: All of its pods that are there.
        start_timeout_s: A pod that its node took and cannot start is failed after so long.

    Raises:
        UnknownStateError: A word that is in none of the tables.
    """
    ended = condition(job, "Complete") or condition(job, "Completed")
    if ended:
        return Seen(State.succeeded, "Complete", None, 0, _host(pods), Cause.done)
    failed = condition(job, "Failed")
    if failed:
        return _failed(failed, pods)
    if job["metadata"].get("deletionTimestamp"):
        return Seen(JOBS["Terminating"], "Terminating", host=_host(pods))
    live = [pod for pod in pods if _phase(pod) not in ("Succeeded", "Failed")]
    if not live and job["spec"].get("suspend"):
        why = condition(job, "Suspended") or {}
        return Seen(JOBS["Suspended"], "Suspended", why.get("message"))
    if not pods:
        return Seen(JOBS["Pending"], "Pending")
    # The pod that is least far says how far all are: the work of several nodes begins with the last one.
    told = (given_up(pod_seen(pod), pod, start_timeout_s) for pod in live or pods)
    return min(told, key=lambda one: _ORDER.index(one.state))


_ORDER = [
    State.failed,
    State.preempted,
    State.queued,
    State.starting,
    State.running,
    State.succeeded,
]


def _failed(why: Mapping[str, Any], pods: Sequence[Object]) -> Seen:
    """A Job that failed: its pods say why, and where they are gone the Job's own message."""
    word, message = why.get("reason") or "Failed", why.get("message")
    translate("Kubernetes", JOBS, word)
    ended = [pod_seen(pod) for pod in pods if _phase(pod) == "Failed"]
    if ended:
        return min(ended, key=_tells)
    code = _EXIT.search(message or "")
    exit_code = int(code[1]) if code else None
    if exit_code == PREEMPTED or "DisruptionTarget" in (message or ""):
        return Seen(State.preempted, word, message, exit_code, cause=Cause.preempted)
    if exit_code is None and word == "BackoffLimitExceeded":
        # Its pod went without a word, and is deleted: nothing but its node takes a pod away so.
        text = f"{message}; its pod is gone"
        return Seen(State.preempted, word, text, cause=Cause.lost)
    found = Cause.time_limit if word == "DeadlineExceeded" else Cause.failed
    return Seen(State.failed, word, message, exit_code, cause=CODES.get(exit_code or 1, found))


def _tells(one: Seen) -> int:
    """Order of several nodes' ends: what the cluster took, what failed by itself, what was taken down with those."""
    if one.word in TAKEN and one.word not in ENDS:
        return 0
    return 2 if one.exit_code in (None, PREEMPTED, 137, 143) and one.word == "Error" else 1


def pod_seen(pod: Object) -> Seen:
    """One pod.

    Raises:
        UnknownStateError: A word that is in none of the tables.
    """
    status = pod.get("status", {})
    phase = _phase(pod)
    state = translate("Kubernetes", PHASES, phase)
    host = pod.get("spec", {}).get("nodeName")
    if phase == "Pending":
        return _pending(pod, host)
    if phase == "Failed":
        return _pod_failed(pod, host)
    if phase == "Succeeded":
        return Seen(state, phase, None, 0, host, Cause.done)
    word = "Terminating" if pod["metadata"].get("deletionTimestamp") else phase
    return Seen(state, word, status.get("message"), host=host)


def cause(pod: Object) -> tuple[Cause, str, str | None]:
    """Why a pod in phase Failed failed: the cause, the cluster's word for it, and what it says besides.

    Raises:
        UnknownStateError: A word that is in none of the tables.
    """
    status, ended = pod["status"], _terminated(pod) or {}
    exit_code, word = ended.get("exitCode"), ended.get("reason")
    if exit_code in CODES and word in (None, "Error"):
        # The shim had its word, whoever told it to stop.
        return CODES[exit_code], "Error", ended.get("message")
    taken = condition(pod, "DisruptionTarget")
    for given in (taken, status):
        if given and given.get("reason"):
            found = translate("Kubernetes", TAKEN, given["reason"])
            return found, given["reason"], given.get("message")
    if word is None:
        return Cause.lost, "Failed", status.get("message")
    return translate("Kubernetes", ENDS, word), word, ended.get("message")


def _pod_failed(pod: Object, host: str | None) -> Seen:
    why, word, message = cause(pod)
    state = State.preempted if why.retried else State.failed
    exit_code = (_terminated(pod) or {}).get("exitCode")
    return Seen(state, word, _tail(message), exit_code, host, why)


def _pending(pod: Object, host: str | None) -> Seen:
    placed = condition(pod, "PodScheduled")
    if placed is None:
        word, message = ("Scheduled" if host else "Pending"), None
    else:
        word, message = placed.get("reason") or "Unschedulable", placed.get("message")
    waiting = [one["state"]["waiting"] for one in _containers(pod) if _is(one, "waiting")]
    if waiting:
        word, message = waiting[0].get("reason") or "ContainerCreating", waiting[0].get("message")
    elif host:
        word, message = "Scheduled", None
    return Seen(translate("Kubernetes", WAITS, word), word, message, host=host)


def condition(given: Object, kind: str) -> Mapping[str, Any] | None:
    """The condition of that type where it holds (``PodScheduled``: where it does not hold)."""
    wanted = "False" if kind == "PodScheduled" else "True"
    for one in given.get("status", {}).get("conditions") or ():
        if one["type"] == kind and one["status"] == wanted:
            found: Mapping[str, Any] = one
            return found
    return None


def _phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _containers(pod: Object) -> Iterable[Object]:
    status = pod.get("status", {})
    return (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))


def _is(container: Object, state: str) -> bool:
    return bool(container.get("state", {}).get(state))


def _terminated(pod: Object) -> Mapping[str, Any] | None:
    for one in _containers(pod):
        if _is(one, "terminated") and one["state"]["terminated"].get("reason") != "Completed":
            found: Mapping[str, Any] = one["state"]["terminated"]
            return found
    return None


def _host(pods: Sequence[Object]) -> str | None:
    hosts = {pod.get("spec", {}).get("nodeName") for pod in pods} - {None}
    return ", ".join(sorted(hosts)) or None


def _tail(message: str | None) -> str | None:
    """The end of what a container printed is its termination message; one line of it says enough."""
    lines = (message or "").strip().splitlines()
    return lines[-1] if lines else None
