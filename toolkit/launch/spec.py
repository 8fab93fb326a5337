"""What a job is, before any engine knows of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Resources:
    """What one job takes, on each of its nodes.

    Attributes:
        gpus: GPUs on each node.
        cpus: Processor cores on each node.
        memory_gib: Main memory on each node, GiB; the engine's default unless given.
        nodes: Machines.
        time_limit_s: After so many seconds the engine ends it; none unless given.
    """

    gpus: int = 0
    cpus: int = 1
    memory_gib: float | None = None
    nodes: int = 1
    time_limit_s: int | None = None


@dataclass(frozen=True)
class JobSpec:
    """One step of a plan, as a job. Written as ``job.json``; nothing reads the recipe again.

    Attributes:
        id: Unique for ever, ``[a-z0-9-]``, at most 52 characters: ``tickets-3fa2c1d4-04-train``. Engines get it as the
            job's name (Slurm: with the comment ``toolkit:<id>``), so that a submission can be found again.
        chain: The chain it belongs to: ``tickets-3fa2c1d4``.
        step: The step's name in the plan.
        stage: The step's stage.
        folder: The job's folder, absolute, on a file system that submitter and job see alike.
        after: Ids of the jobs of the same chain that must succeed first.
        argv: What an engine starts on every node: the shim with the folder.
        env: Variables that it is started with; never secrets.
        secrets: Variable -> where its value is, in the engine's terms; values are never written.
        resources: What it takes.
        retries: How often it may be started again after a cause that is ``retried``.
        grace_s: Seconds between the first word of a coming end and the end: time for a checkpoint.
        options: The profile's section for its engine, as plain data.
    """

    id: str
    chain: str
    step: str
    stage: str
    folder: str
    after: tuple[str, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = Resources()
    retries: int = 3
    grace_s: int = 90
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> JobSpec:
        """Read ``job.json`` of a job's folder."""
        given = json.loads((folder / "job.json").read_text())
        given |= {"resources": Resources(**given["resources"])}
        given |= {key: tuple(given[key]) for key in ("after", "argv")}
        return cls(**given)

    def to_json(self) -> str:
        """As ``job.json`` holds it."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
