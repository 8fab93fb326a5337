"""Pods that do not begin: kubelets try again for ever, a profile's patience ends. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from toolkit.launch.states import Cause, Seen, State

STUCK: Mapping[str, Cause] = {
    "ErrImagePull": Cause.not_installed,
    "ImagePullBackOff": Cause.not_installed,
    "ErrImageNeverPull": Cause.not_installed,
    "ImageInspectError": Cause.not_installed,
    "InvalidImageName": Cause.not_installed,
    "RegistryUnavailable": Cause.not_installed,
    "SignatureValidationFailed": Cause.not_installed,
    "CreateContainerConfigError": Cause.usage,  # a Secret or its key is not there
    "CreateContainerError": Cause.failed,
    "RunContainerError": Cause.failed,
    "PreStartHookError": Cause.failed,
    # The node's own trouble: another one may do better.
    "CreatePodSandboxError": Cause.lost,
    "ConfigPodSandboxError": Cause.lost,
}
"""Reasons of waiting containers, given by kubelets that failed; not ``ContainerCreating``: images are large."""


def given_up(
    one: Seen, pod: Mapping[str, Any], start_timeout_s: float, now: float | None = None
) -> Seen:
    """``one``, or its end where the pod has been at its node for too long and the kubelet says that it cannot.

    Args:
        one: What the pod says.
        pod: The pod.
        start_timeout_s: The patience, seconds since its node took it.
        now: Seconds since 1970; the clock unless given.
    """
    cause, taken = STUCK.get(one.word), pod.get("status", {}).get("startTime")
    if cause is None or taken is None:
        return one
    if (now or time.time()) - datetime.fromisoformat(taken).timestamp() < start_timeout_s:
        return one
    said = f"{one.word}: {one.reason}" if one.reason else one.word
    return replace(
        one,
        state=State.preempted if cause.retried else State.failed,
        reason=f"{said} (for {start_timeout_s:g} s: kubernetes.start_timeout_s)",
        cause=cause,
    )
