"""Profiles: one YAML file that says where a recipe runs and which interpreters it finds there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from toolkit import resources, strict
from toolkit.environments.resolve import detect_accelerator
from toolkit.errors import UsageError
from toolkit.launch.kubernetes.section import KubernetesSection
from toolkit.launch.local.section import LocalSection
from toolkit.launch.ray.section import RaySection
from toolkit.launch.slurm.section import SlurmSection
from toolkit.recipe.base import Name, Section
from toolkit.registry import close_match

StageName = Literal[
    "fetch", "data", "train", "export", "quantize", "evaluate", "reference", "serve", "choose"
]
"""Stages, whose jobs may ask for different things."""

UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class EnvironmentSection(Section):
    """What stands in for a logical environment: another lock, or an interpreter."""

    lock: str | None = None
    """Lock to build it from, such as `train-cpu`."""
    python: str | None = None
    """An interpreter that is there: a path or a program on PATH; `~`, `$VARIABLES` work."""
    pythonpath: tuple[str, ...] = ()
    """Folders put before the interpreter's own packages, the first one first."""
    variables: Mapping[str, str] = Field(default_factory=dict)
    """Environment variables for its processes."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.lock and self.python:
            raise ValueError(
                "lock and python are both given: an environment is built or is there, not both"
            )
        if self.pythonpath and not self.python:
            raise ValueError("pythonpath needs python: packages are made for one interpreter")
        return self


class EnvironmentsSection(Section):
    """Replacements by logical name. There is none for core: it is the Python that the toolkit runs in."""

    train: EnvironmentSection | None = None
    quantize: EnvironmentSection | None = None
    vllm: EnvironmentSection | None = None
    sglang: EnvironmentSection | None = None
    router: EnvironmentSection | None = None

    def of(self, name: str) -> EnvironmentSection | None:
        """The replacement of a logical environment, if there is one."""
        found: EnvironmentSection | None = getattr(self, name, None)
        return found


class GpuSection(Section):
    """The GPUs that a job gets; preflight asks the driver of this machine unless they are given."""

    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU, GiB."""
    capability: Annotated[float, Field(gt=0)] | None = None
    """Compute capability: 8.0 Ampere, 8.9 Ada, 9.0 Hopper, 10.0 Blackwell."""
    count: Annotated[int, Field(ge=1)] = 1
    """GPUs of the machine."""


class NodesSection(Section):
    """Several machines that train one model together. Each sees the workspace under the same path."""

    count: Annotated[int, Field(ge=2)]
    """Machines; the job engine starts the worker on each, with `TOOLKIT_NODE` 0, 1, ..."""
    rendezvous: Annotated[str, Field(pattern=r"^\S+:\d+$")] | None = None
    """`host:port` on the first of them, where they meet; job engines that know the first node say it themselves."""


class AskedSection(Section):
    """What a job asks of its engine; what is not given is the default of the stage."""

    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs on each node. By default those of `gpu.count` for training, one for stages that compute, else none."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """Processor cores on each node."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Main memory on each node, GiB."""
    time_limit: str | None = None
    """How long it may run: `90` (seconds), `30m`, `12h`, `2d`. A checkpoint is kept ahead of it, and it goes on."""

    @field_validator("time_limit")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds_of(value)
        return value


class ResourcesSection(AskedSection):
    """What jobs ask for: all, and those of single stages."""

    stages: Mapping[StageName, AskedSection] = Field(default_factory=dict)
    """By stage, where it differs: `train: {gpus: 8}`."""


class LimitsSection(Section):
    """What is refused."""

    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """GPU-hours that the chains of this profile may use in a workspace, with what is submitted at its time limits."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Chains of this profile that may be under way at once in a workspace."""


class Profile(Section):
    """Where and how big."""

    name: Name
    """Name of the profile."""
    description: str = ""
    """One line for people."""
    backend: Literal["local", "slurm", "ray", "kubernetes"] = "local"
    """What starts the steps of `toolkit run --on`."""
    python: str | None = None
    """The core's interpreter on the machines of the jobs; the one that submits unless given."""
    resources: ResourcesSection = ResourcesSection()
    """What jobs ask for."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a job is started again after a preemption or loss; tries that got further do not count."""
    grace_s: Annotated[int, Field(ge=5)] = 90
    """Seconds from the first word of a coming end to the end: time for a checkpoint."""
    limits: LimitsSection = LimitsSection()
    """What is refused."""
    variables: Mapping[str, str] = Field(default_factory=dict)
    """Environment variables of the jobs; never secrets, they are written down."""
    secrets: Mapping[str, str] = Field(default_factory=dict)
    """Variable -> where its value is: `env:NAME`, `file:/path`, or what the engine knows. Values are never written."""
    local: LocalSection | None = None
    """This machine's own keys."""
    slurm: SlurmSection | None = None
    """Where and how on a Slurm cluster."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Which locks are meant; `auto` looks for an NVIDIA device."""
    gpu: GpuSection | None = None
    """The GPUs that a job gets, when it runs elsewhere than where it is planned."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes that training is split over, on each machine: as many as GPUs unless given; one on a CPU."""
    nodes: NodesSection | None = None
    """Several machines for training; one unless given."""
    ray: RaySection | None = None
    """The cluster, for the backend `ray`."""
    kubernetes: KubernetesSection | None = None
    """The cluster, for the backend `kubernetes`."""
    environments: EnvironmentsSection = EnvironmentsSection()
    """Replacements by logical name; what is not named is built from its lock."""

    _folder: Path | None = PrivateAttr(default=None)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """``cpu`` or ``cuda``: what steps are told to compute on."""
        return detect_accelerator() if self.accelerator == "auto" else self.accelerator

    @property
    def options(self) -> dict[str, Any]:
        """The section of the profile's own engine, as plain data; its defaults unless given."""
        section: Section | None = getattr(self, self.backend)
        return section.model_dump(mode="json") if section else {}

    @property
    def interpreter(self) -> str:
        """Starts the shim on the machines of the jobs: ``python`` of the path where Ray installs the core's lock."""
        installed = self.backend == "ray" and self.ray and self.ray.runtime_env == "lock"
        return self.python or ("python" if installed else sys.executable)

    @property
    def folder(self) -> Path | None:
        """Folder of the file, where relative paths start; ``None`` for a profile made in memory."""
        return self._folder


def seconds_of(text: str) -> int:
    """``"90"``, ``"30m"``, ``"12h"``, ``"2d"`` in seconds.

    Raises:
        ValueError: It is no such text.
    """
    number, unit = text.rstrip("smhd"), text[len(text.rstrip("smhd")) :]
    if not number.isdigit() or unit not in UNITS_S or int(number) == 0:
        raise ValueError(f"{text!r} is no time: write 90, 30m, 12h or 2d")
    return int(number) * UNITS_S[unit]


def profile_names() -> tuple[str, ...]:
    """Names of the shipped profiles."""
    return tuple(sorted(path.stem for path in resources.profiles().glob("*.yaml")))


def load(given: str | Path | None = None) -> Profile:
    """Read a profile: a file, or a shipped one by name; ``local`` unless given.

    Raises:
        UsageError: There is no such file or name.
        RecipeError: The file is wrong; all problems with their lines.
    """
    path = _find(str(given or "local"))
    profile = strict.read(path, Profile)
    profile._folder = path.absolute().parent
    return profile


def _find(given: str) -> Path:
    if "/" in given or given.endswith((".yaml", ".yml")):
        if not Path(given).is_file():
            raise UsageError(f"there is no profile file {given}")
        return Path(given)
    if given not in profile_names():
        hint = f"known: {', '.join(profile_names())}; a file of your own needs its path"
        raise UsageError(
            f"no profile is named {given!r}{close_match(given, profile_names())}", hint
        )
    return resources.profiles() / f"{given}.yaml"
