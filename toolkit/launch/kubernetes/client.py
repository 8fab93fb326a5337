"""The API server through the official client: its configuration, certificates and ways to log in; paths are ours.

Objects go and come as they are: the client's classes would drop what they do not know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from toolkit.errors import BackendError, NotInstalledError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

    from toolkit.launch.kubernetes.section import KubernetesSection

PATHS = {
    "job": "/apis/batch/v1/namespaces/{namespace}/jobs",
    "jobset": "/apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets",
    "pod": "/api/v1/namespaces/{namespace}/pods",
}
PAGE = 500
"""Objects of one answer."""
IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
HINTS = {
    401: "log in again, as for kubectl",
    403: "ask for the rights to create, list and delete jobs (batch) and to list pods and pods/log; with several "
    "nodes also jobsets (jobset.x-k8s.io)",
}


class Refused(BackendError):  # noqa: N818 - named for what happened
    """The API server's answer was no; ``status`` is HTTP's."""

    def __init__(self, message: str, hint: str | None, status: int) -> None:
        super().__init__(message, hint)
        self.status = status


@dataclass
class Cluster:
    """One namespace of one cluster."""

    api: ApiClient
    namespace: str
    timeout_s: float

    @classmethod
    def connect(cls, section: KubernetesSection) -> Cluster:
        """Read the configuration; nothing is asked yet.

        Raises:
            NotInstalledError: The client is not installed.
            BackendError: There is no configuration, or not that context.
        """
        try:
            from kubernetes import config
        except ImportError as error:
            raise NotInstalledError(
                "the Kubernetes client is not installed", "pip install 'toolkit[kubernetes]'"
            ) from error
        file = os.path.expandvars(section.kubeconfig) if section.kubeconfig else None
        file = str(Path(file).expanduser()) if file else None
        try:
            if not file and "KUBECONFIG" not in os.environ and IN_POD.exists():
                return cls(
                    _in_pod(), section.namespace or IN_POD.read_text().strip(), section.timeout_s
                )
            contexts, current = config.list_kube_config_contexts(file)
            api = config.new_client_from_config(file, section.context)
        except config.ConfigException as error:
            raise BackendError(
                f"no way to a Kubernetes cluster: {error}",
                "kubectl config get-contexts; kubernetes.kubeconfig and kubernetes.context in the profile name others",
            ) from error
        wanted = section.context or current["name"]
        named: Mapping[str, Any] = next(one for one in contexts if one["name"] == wanted)["context"]
        return cls(api, section.namespace or named.get("namespace") or "default", section.timeout_s)

    def create(self, kind: str, text: str) -> dict[str, Any]:
        """Send one object as the YAML it is written in.

        Raises:
            BackendError: The server does not answer.
            Refused: It says no.
        """
        # Strict: a field that this cluster does not know (an old one) would be dropped without a word.
        query = {"fieldValidation": "Strict", "fieldManager": "toolkit"}
        return self._json("POST", PATHS[kind], query, text)

    def list(self, kind: str, selector: str) -> list[dict[str, Any]]:
        """All objects with these labels, page after page.

        Raises:
            BackendError: The server does not answer.
            Refused: It says no.
        """
        found: list[dict[str, Any]] = []
        query = {"labelSelector": selector, "limit": str(PAGE)}
        while True:
            page = self._json("GET", PATHS[kind], query)
            found += page.get("items") or []
            more = page.get("metadata", {}).get("continue")
            if not more:
                return found
            query["continue"] = more

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """One object; ``None`` where there is none.

        Raises:
            BackendError: The server does not answer.
            Refused: It says no.
        """
        try:
            return self._json("GET", f"{PATHS[kind]}/{name}", {})
        except Refused as error:
            if error.status != 404:
                raise
            return None

    def delete(self, kind: str, name: str) -> None:
        """End an object and all that it made; one that is not there is left at that.

        Raises:
            BackendError: The server does not answer.
            Refused: It says no.
        """
        # In the foreground: the object stays until its last pod is gone.
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
        self._gone("DELETE", f"{PATHS[kind]}/{name}", {}, body)

    def delete_pod(self, name: str, grace_s: int) -> None:
        """End a pod: SIGTERM now, SIGKILL after ``grace_s``.

        Raises:
            BackendError: The server does not answer.
            Refused: It says no.
        """
        self._gone("DELETE", f"{PATHS['pod']}/{name}", {"gracePeriodSeconds": str(grace_s)}, None)

    def log(self, pod: str) -> Iterator[str]:
        """Lines that a pod printed so far.

        Raises:
            BackendError: The server does not answer, or breaks off.
            Refused: It says no.
        """
        from urllib3.exceptions import HTTPError

        response, rest = self._ask("GET", f"{PATHS['pod']}/{pod}/log", {}, None), b""
        try:
            for chunk in response.response.stream(2**16):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        except HTTPError as error:
            raise BackendError(f"the log of pod {pod} broke off: {error}") from error
        if rest:
            yield rest.decode(errors="replace")

    def _gone(self, method: str, path: str, query: Mapping[str, str], body: Any) -> None:
        try:
            self._json(method, path, query, body)
        except Refused as error:
            if error.status != 404:
                raise

    def _json(
        self, method: str, path: str, query: Mapping[str, str], body: Any = None
    ) -> dict[str, Any]:
        response = self._ask(method, path, query, body)
        found: dict[str, Any] = json.loads(response.read())
        return found

    def _ask(self, method: str, path: str, query: Mapping[str, str], body: Any) -> Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json" if not path.endswith("/log") else "*/*"}
        if body is not None:
            written = isinstance(body, str)
            headers["Content-Type"] = "application/yaml" if written else "application/json"
        where = path.format(namespace=self.namespace)
        asked = self.api.param_serialize(
            method,
            where + (f"?{urlencode(query)}" if query else ""),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self.api.call_api(*asked, _request_timeout=self.timeout_s)
            if response.status >= 400:
                raise self._refused(response.status, response.read(), where)
        except (HTTPError, ApiException) as error:
            raise BackendError(
                f"Kubernetes at {self.api.configuration.host} does not answer: {error}",
                "is the cluster there, and the network open? kubectl cluster-info",
            ) from error
        return response

    def _refused(self, status: int, body: bytes, where: str) -> Refused:
        try:
            said = json.loads(body)["message"]
        except (ValueError, KeyError, TypeError):
            said = body.decode(errors="replace")[:500]
        hint = HINTS.get(status)
        if status == 404 and "/jobsets" in where:
            hint = "jobs of several nodes need JobSet in the cluster: https://jobset.sigs.k8s.io"
        return Refused(f"Kubernetes refuses ({status}): {said}", hint, status)


def _in_pod() -> ApiClient:
    """The account of the pod that this runs in."""
    from kubernetes import client, config

    found = client.Configuration()
    config.load_incluster_config(found)
    return client.ApiClient(found)
