"""What a profile says about a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from toolkit.recipe.base import Section


class VolumeSection(Section):
    """Storage that every pod sees under the same path. Exactly one of `claim`, `nfs`, `empty_gib` and `config_map`."""

    path: Annotated[str, Field(pattern=r"^/.+")]
    """Where pods see it; for what the submitter shares with them, the path that it has there too."""
    claim: str | None = None
    """A PersistentVolumeClaim; several nodes need one that many may write (`ReadWriteMany`)."""
    nfs: Annotated[str, Field(pattern=r"^[^:]+:/.*$")] | None = None
    """`server:/exported/folder`."""
    empty_gib: Annotated[float, Field(gt=0)] | None = None
    """A folder that is new in every pod, of this size, GiB."""
    config_map: str | None = None
    """Files of a ConfigMap, to read."""
    sub_path: str | None = None
    """Folder in the volume that is mounted instead of its root."""
    read_only: bool = False
    """Mounted to read only."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [
            name
            for name in ("claim", "nfs", "empty_gib", "config_map")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise ValueError(
                f"a volume is one of claim, nfs, empty_gib and config_map; {said} is given"
            )
        return self

    @property
    def lasts(self) -> bool:
        """Whether what is written there is there for the next pod."""
        return not self.read_only and (self.claim is not None or self.nfs is not None)


class TolerationSection(Section):
    """A taint of nodes that pods put up with."""

    key: str | None = None
    """The taint's key; all of them unless given."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """`Exists` asks for no value."""
    value: str | None = None
    """The taint's value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Which effect; all unless given."""


class KubernetesSection(Section):
    """A cluster, and how pods are made for it. Rights are not a choice: no pod is root or gets a token."""

    kubeconfig: str | None = None
    """The cluster's address and your rights; `$KUBECONFIG`, `~/.kube/config` or the pod's own unless given."""
    context: str | None = None
    """Context of that file; its current one unless given."""
    namespace: str | None = None
    """Where jobs go; the context's unless given."""
    image: str | None = None
    """Container image with the `python` of the profile in it. Needed; best with its digest."""
    images: Mapping[str, str] = Field(default_factory=dict)
    """Other images by stage: `serve: registry.example/serve@sha256:...`."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When nodes fetch the image; the cluster's default unless given."""
    pull_secrets: tuple[str, ...] = ()
    """Secrets for a registry that asks who you are."""
    volumes: tuple[VolumeSection, ...] = ()
    """Storage. One of them holds the workspace, which you submit from: `jobs/templates/kubernetes-submitter.yaml`."""
    queue: str | None = None
    """Kueue: the LocalQueue that admits jobs."""
    priority_class: str | None = None
    """PriorityClass of the pods."""
    gpu: str = "nvidia.com/gpu"
    """Resource that stands for one GPU."""
    node_selector: Mapping[str, str] = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: tuple[TolerationSection, ...] = ()
    """Taints that pods put up with."""
    runtime_class: str | None = None
    """RuntimeClass of the pods."""
    service_account: str | None = None
    """Account of the pods, for clusters whose rules look at it; its token is not mounted."""
    user: Annotated[int, Field(ge=1)] = 2000
    """User id of the pods' processes, not 0. Where the workspace is shared, yours: it is for its owner alone."""
    group: Annotated[int, Field(ge=1)] = 2000
    """Group id of the pods' processes."""
    shared_memory_gib: Annotated[float, Field(gt=0)] = 2
    """Size of `/dev/shm`, GiB; it counts as the pod's memory."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    """Where the processes of several nodes meet, on the first of them."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900
    """A pod that its node took, and whose image or Secret the kubelet cannot get, fails after so long, seconds."""
    keep_s: Annotated[int, Field(ge=0)] = 7 * 24 * 3600
    """So long an ended job stays in the cluster, for those who look at it there, seconds."""
    labels: Mapping[str, str] = Field(default_factory=dict)
    """Labels of all objects besides the toolkit's, such as the one that bills are made by."""
    annotations: Mapping[str, str] = Field(default_factory=dict)
    """Annotations of pods."""
    timeout_s: Annotated[float, Field(gt=0)] = 30
    """The API server is given so long to answer, seconds."""
