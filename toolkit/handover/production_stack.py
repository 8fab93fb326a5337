"""vLLM production-stack without Helm: engines, its router, and the rights and rules between them.

The router finds engine pods by their label through the Kubernetes API. Clients reach the router alone; a
NetworkPolicy keeps everyone else from the engines, whose ``/tokenize`` and ``/metrics`` no key guards.
"""

from __future__ import annotations

from typing import Any

from toolkit.handover import MODELS, PORT, Handover
from toolkit.handover.manifest import dump
from toolkit.handover.pods import (
    CONTAINER_SECURITY,
    POD_SECURITY,
    probes,
    scratch,
    secret_variable,
    shared_memory,
)

ROUTER_IMAGE = "lmcache/lmstack-router:latest"
"""The project publishes no numbered tag that its chart names; pin the digest that you tested."""
ROUTER_PORT = 8000
GRACE_S = 30
"""On top of the drain: to write logs and to free the GPU."""


class ProductionStack:
    """See :class:`toolkit.handover.Target`."""

    def render(self, handover: Handover) -> str:
        """Eight objects, for ``kubectl apply -f``."""
        return dump(
            _deployment(handover, "-engine", handover.deployment.serve.replicas, _engine(handover)),
            _policy(handover),
            _account(handover),
            _role(handover),
            _binding(handover),
            _deployment(handover, "-router", 1, _router(handover)),
            _service(handover),
        )


def _labels(handover: Handover, part: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": handover.name, "app.kubernetes.io/component": part}


def _deployment(
    handover: Handover, suffix: str, replicas: int, pod: dict[str, Any]
) -> dict[str, Any]:
    labels = _labels(handover, suffix.strip("-"))
    template = {"metadata": {"labels": handover.labels | labels}, "spec": pod}
    spec: dict[str, Any] = {
        "replicas": replicas,
        "selector": {"matchLabels": labels},
        "template": template,
    }
    if suffix == "-engine":
        # A rolling update needs GPUs to spare; without them the old pod has to go first.
        spec["strategy"] = {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": handover.metadata(suffix),
        "spec": spec,
    }


def _engine(handover: Handover) -> dict[str, Any]:
    claim, folder = handover.places.claim("production-stack")
    volumes, mounts = scratch("/tmp", "/home/engine")  # noqa: S108 - inside a container
    volumes.append(
        {"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
    )
    mount = {"name": "models", "mountPath": str(MODELS), "readOnly": True}
    mounts.append(mount | ({"subPath": folder} if folder else {}))
    if handover.gpus > 1:
        volume, shared = shared_memory()
        volumes.append(volume)
        mounts.append(shared)
    serve = handover.deployment.serve
    container = {
        "name": "engine",
        "image": handover.image,
        "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        # Not loopback: the router is in another pod. The policy below is what keeps others out.
        "args": ["--host", "0.0.0.0", "--port", str(PORT), *handover.without("--host", "--port")],  # noqa: S104
        "env": _variables(handover, {"HOME": "/home/engine", **handover.env}),
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": {"nvidia.com/gpu": str(handover.gpus)}},
        "securityContext": CONTAINER_SECURITY,
        **probes("/health", "http", serve.start_timeout_s),
        "volumeMounts": mounts,
    }
    return {
        "automountServiceAccountToken": False,
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": serve.drain_s + GRACE_S,
        "containers": [container],
        "volumes": volumes,
    }


def _router(handover: Handover) -> dict[str, Any]:
    selector = ",".join(f"{key}={value}" for key, value in _labels(handover, "engine").items())
    volumes, mounts = scratch("/tmp")  # noqa: S108 - inside a container
    place = {"fieldRef": {"fieldPath": "metadata.namespace"}}
    container = {
        "name": "router",
        "image": ROUTER_IMAGE,
        "args": [
            *("--host", "0.0.0.0", "--port", str(ROUTER_PORT)),  # noqa: S104 - a pod's own address
            *("--service-discovery", "k8s", "--k8s-namespace", "$(NAMESPACE)"),
            *("--k8s-port", str(PORT), "--k8s-label-selector", selector),
            *("--routing-logic", "roundrobin"),
        ],
        "env": [
            {"name": "NAMESPACE", "valueFrom": place},
            *_variables(handover, {"HOME": "/tmp"}),  # noqa: S108 - inside a container
        ],
        "ports": [{"name": "http", "containerPort": ROUTER_PORT}],
        "securityContext": CONTAINER_SECURITY | {"readOnlyRootFilesystem": True},
        **probes("/health", "http", 120),
        "volumeMounts": mounts,
    }
    return {
        "serviceAccountName": f"{handover.name}-router",
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": handover.deployment.serve.drain_s + GRACE_S,
        "containers": [container],
        "volumes": volumes,
    }


def _variables(handover: Handover, given: dict[str, str]) -> list[dict[str, Any]]:
    variables: list[dict[str, Any]] = [{"name": key, "value": text} for key, text in given.items()]
    if handover.places.secret:
        # vLLM asks for it on /v1; the router shows it when it looks for models.
        variables.append(secret_variable("VLLM_API_KEY", handover.places.secret))
    return variables


def _policy(handover: Handover) -> dict[str, Any]:
    router = {"podSelector": {"matchLabels": _labels(handover, "router")}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": handover.metadata("-engine"),
        "spec": {
            "podSelector": {"matchLabels": _labels(handover, "engine")},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [router], "ports": [{"port": PORT}]}],
        },
    }


def _account(handover: Handover) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": handover.metadata("-router")}


def _role(handover: Handover) -> dict[str, Any]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": handover.metadata("-router"),
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}],
    }


def _binding(handover: Handover) -> dict[str, Any]:
    name = f"{handover.name}-router"
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": handover.metadata("-router"),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name}],
    }


def _service(handover: Handover) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": handover.metadata(),
        "spec": {
            "selector": _labels(handover, "router"),
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }
