"""Profiles: one YAML file that says where a recipe runs and which interpreters it finds there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from toolkit import resources, strict
from toolkit.environments.resolve import detect_accelerator
from toolkit.errors import UsageError
from toolkit.launch.kubernetes.section import KubernetesSection
from toolkit.recipe.base import Name, Section
from toolkit.registry import close_match


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
    rendezvous: str
    """`host:port` on the first of them, where they meet."""


class Profile(Section):
    """Where and how big."""

    name: Name
    """Name of the profile."""
    description: str = ""
    """One line for people."""
    backend: Literal["local", "slurm", "ray", "kubernetes"] = "local"
    """What starts the steps of `toolkit run --on`."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Which locks are meant; `auto` looks for an NVIDIA device."""
    gpu: GpuSection | None = None
    """The GPUs that a job gets, when it runs elsewhere than where it is planned."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes that training is split over, on each machine: as many as GPUs unless given; one on a CPU."""
    nodes: NodesSection | None = None
    """Several machines for training; one unless given."""
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
    def folder(self) -> Path | None:
        """Folder of the file, where relative paths start; ``None`` for a profile made in memory."""
        return self._folder


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
