"""Parts of pods that are the same wherever they run: rights, probes, volumes."""

from __future__ import annotations

import math
from typing import Any

USER = 2000
"""Not root, and no user of the images: they have to work for any."""

POD_SECURITY: dict[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}
PROBE_S = 10


def probes(path: str, port: str, start_timeout_s: int) -> dict[str, Any]:
    """Startup, readiness and liveness on one path: patient until it is up, then quick to take it out of service."""
    get = {"httpGet": {"path": path, "port": port}, "timeoutSeconds": 5}
    return {
        "startupProbe": {
            **get,
            "periodSeconds": PROBE_S,
            "failureThreshold": math.ceil(start_timeout_s / PROBE_S),
        },
        "readinessProbe": {**get, "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**get, "periodSeconds": PROBE_S, "failureThreshold": 6},
    }


def secret_variable(variable: str, secret: str, key: str = "api-key") -> dict[str, Any]:
    """An environment variable from a Secret, by reference."""
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def scratch(*paths: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts) of empty folders that the user may write to."""
    names = {path: path.strip("/").replace("/", "-") for path in paths}
    volumes: list[dict[str, Any]] = [{"name": name, "emptyDir": {}} for name in names.values()]
    return volumes, [{"name": name, "mountPath": path} for path, name in names.items()]


def shared_memory() -> tuple[dict[str, Any], dict[str, Any]]:
    """(volume, mount) for processes that share one model: the default of 64 MiB is too small for NCCL."""
    volume = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
    return volume, {"name": "shm", "mountPath": "/dev/shm"}  # noqa: S108 - where Linux has it
