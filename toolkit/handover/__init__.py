"""Hand-over: a recipe's server as manifests for a serving stack that a cluster has already.

Pure: from a recipe and names of places in the cluster to text. Nothing is sent anywhere. The engine's arguments are
those of :mod:`toolkit.engines`, so that a cluster serves with what was proven here.

The weights are expected below one address: ``model/`` (the base, or a complete model) and ``adapters/NAME/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from toolkit.engines import ENGINES, Adapter, Deployment
from toolkit.errors import UsageError
from toolkit.recipe.recipe import Recipe
from toolkit.registry import Registry
from toolkit.resources import locks

MODELS = Path("/mnt/models")
"""Where containers see the weights."""
SCHEMES = ("pvc", "s3", "gs", "abfss", "azure")
PORT = 8000
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,51}[a-z0-9])?")
"""Kubernetes' rule, short enough for what is appended."""


@dataclass(frozen=True)
class Places:
    """What the recipe cannot know.

    Attributes:
        weights: ``pvc://CLAIM/FOLDER``, ``s3://BUCKET/FOLDER`` and the like; ``model/`` and ``adapters/`` are below.
        image: The engine's image; the engine's own of the locked version unless given.
        namespace: Where the objects go; what ``kubectl`` is set to unless given.
        secret: Name of a Secret whose key ``api-key`` clients and the router must show to the engine.
        accelerator: Ray's name of the GPU (``H100``).
    """

    weights: str
    image: str | None = None
    namespace: str | None = None
    secret: str | None = None
    accelerator: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.weights)
        if parts.scheme not in SCHEMES or not parts.netloc:
            raise UsageError(
                f"{self.weights!r} is not the address of weights in a cluster",
                "write it as pvc://CLAIM/FOLDER or s3://BUCKET/FOLDER, with model/ and adapters/NAME/ below",
            )

    def below(self, *names: str) -> str:
        """The address of a folder below :attr:`weights`."""
        return "/".join((self.weights.rstrip("/"), *names))

    def claim(self, target: str) -> tuple[str, str]:
        """(claim, folder in it) of a ``pvc://`` address.

        Raises:
            UsageError: ``target`` mounts volumes, and the weights are elsewhere.
        """
        parts = urlsplit(self.weights)
        if parts.scheme != "pvc":
            raise UsageError(
                f"{target} mounts a volume, but the weights are at {self.weights}",
                "copy them into a PersistentVolumeClaim and write --weights pvc://CLAIM/FOLDER",
            )
        return parts.netloc, parts.path.strip("/")


@dataclass(frozen=True)
class Handover:
    """One server, resolved for a cluster.

    Attributes:
        name: Name of the objects.
        deployment: What the engine is started with; paths are those inside a container.
        flags: The engine's arguments without program, address and port.
        env: Its environment variables.
        subject: Which model of the recipe it is.
    """

    name: str
    subject: str
    deployment: Deployment
    flags: tuple[str, ...]
    places: Places
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def image(self) -> str:
        """The engine's image."""
        return self.places.image or f"vllm/vllm-openai:v{locked_version('vllm')}"

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        serve = self.deployment.serve
        return serve.tensor_parallel * serve.pipeline_parallel * serve.data_parallel

    def without(self, *names: str) -> tuple[str, ...]:
        """The flags but these, each with its values."""
        kept, dropping = [], False
        for word in self.flags:
            if word.startswith("--"):
                dropping = word in names
            if not dropping:
                kept.append(word)
        return tuple(kept)

    def metadata(self, suffix: str = "") -> dict[str, Any]:
        """Of an object that belongs to this server."""
        place = {"namespace": self.places.namespace} if self.places.namespace else {}
        return {"name": f"{self.name}{suffix}", **place, "labels": self.labels}

    @property
    def labels(self) -> dict[str, str]:
        """Of all objects."""
        return {"app.kubernetes.io/name": self.name, "app.kubernetes.io/managed-by": "toolkit"}


class Target(Protocol):
    """A serving stack."""

    def render(self, handover: Handover) -> str:
        """The manifests as YAML."""
        ...


TARGETS = Registry(
    "target",
    {
        "kserve": "toolkit.handover.kserve:Kserve",
        "production-stack": "toolkit.handover.production_stack:ProductionStack",
        "ray": "toolkit.handover.ray:Ray",
    },
)
"""Serving stacks by name."""


def resolve(recipe: Recipe, subject: str | None, folder: Path, places: Places) -> Handover:
    """Turn a recipe into what a cluster is told.

    Args:
        recipe: It has a ``serve`` section.
        subject: Model of the recipe; the first of ``serve.models`` unless given.
        folder: Where the recipe lies; ``serve.adapters`` are read below it for their rank.
        places: Where things are in the cluster.

    Raises:
        UsageError: The recipe serves nothing, not this, or with an engine that these stacks do not have.
        EngineError: A folder of ``serve.adapters`` is not a LoRA adapter.
    """
    serve = recipe.serve
    if serve is None:
        raise UsageError("the recipe has no serve section", "add `serve: {engine: vllm}` to it")
    if serve.engine == "sglang":
        raise UsageError(
            "the recipe serves with sglang, but KServe's, Ray's and the production stack's LLM servers are vLLM",
            "hand over with --set serve.engine=vllm, after proving it with that engine here",
        )
    if serve.engines:
        raise UsageError(
            f"serve.engines names {serve.engines[0]}, and a cluster's router knows its own engines only",
            "hand over with --set 'serve.engines=[]' and the number of them in serve.replicas",
        )
    chosen = subject or recipe.served[0]
    if chosen not in recipe.served:
        raise UsageError(
            f"serve.models does not name {chosen!r}", f"it names {', '.join(recipe.served)}"
        )
    name = serve.name or recipe.name
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a Kubernetes object",
            "lower-case letters, digits and '-' only: --set serve.name=...",
        )
    deployment = Deployment(
        model=MODELS / "model",
        name=name,
        max_length=recipe.model.max_length,
        device="cuda",
        # Adapters come with the objects; a route that loads any folder is not opened in a cluster.
        serve=serve.model_copy(update={"live_adapters": False}),
        adapters=_adapters(recipe, chosen, folder),
        chat_template=MODELS / "model" / "chat_template.jinja",
        draft=MODELS / "draft" if serve.draft else None,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    command = ENGINES["vllm"]().command(Path("python3"), deployment, PORT)
    flags = tuple(command.argv[3:])
    env = {key: value for key, value in command.env.items() if value is not None}
    return Handover(name, chosen, deployment, flags, places, env)


def _adapters(recipe: Recipe, subject: str, folder: Path) -> tuple[Adapter, ...]:
    """The trained one, then those of ``serve.adapters``."""
    assert recipe.serve is not None  # noqa: S101 - resolve() refused that
    found = []
    if subject == "tuned" and recipe.train and recipe.train.method != "full":
        name = recipe.serve.name or recipe.name
        lora = recipe.train.lora
        targets = None if isinstance(lora.targets, str) else tuple(sorted(lora.targets))
        found.append(Adapter(name, MODELS / "adapters" / name, lora.served_rank, targets))
    for given in recipe.serve.adapters:
        read = Adapter.read(given.name, folder / given.path)
        found.append(replace(read, path=MODELS / "adapters" / given.name))
    return tuple(found)


def locked_version(package: str) -> str:
    """Version of the engine in the lock for CUDA."""
    text = (locks() / f"{package}-cuda.txt").read_text()
    found = re.search(rf"^{re.escape(package)}==(\S+)", text, re.MULTILINE)
    if found is None:
        raise UsageError(f"the lock of {package} names no version", "give --image")
    return found[1]
