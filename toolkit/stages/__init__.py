"""Stages: what a step can do. Each is a verb in a module of its own, imported when it is used.

A stage runs as a process of its own, in the interpreter of its environment (see
``stages/__main__.py``). It knows nothing of MLflow, job engines or terminals: it reads finished
inputs, writes into an empty folder and reports numbers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol, Self, TypeVar

from toolkit.recipe.base import Section
from toolkit.registry import Registry


class Kind(StrEnum):
    """What an artifact holds."""

    model = "model"
    """A model folder: weights, config, tokenizer, chat template."""
    dataset = "dataset"
    """Normalised rows, their tokens, and the ledger."""
    adapter = "adapter"
    """A PEFT adapter folder."""
    report = "report"
    """Numbers and files for people; no stage loads weights from it."""


@dataclass(frozen=True)
class Interpreter:
    """A Python and the folders put before its own packages."""

    python: Path
    pythonpath: tuple[Path, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def environ(self) -> dict[str, str]:
        """This process's environment variables, changed so that ``python`` finds ``pythonpath`` and nothing of ours."""
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        }
        if self.pythonpath:
            env["PYTHONPATH"] = os.pathsep.join(str(p) for p in self.pythonpath)
        env["PATH"] = f"{self.python.parent}{os.pathsep}{env.get('PATH', '')}"
        return env | dict(self.variables)


@dataclass(frozen=True)
class Input:
    """A finished artifact that a step reads."""

    path: Path
    kind: Kind
    fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the stage that made it returned as :attr:`StageResult.facts`."""

    @property
    def trusts_code(self) -> bool:
        """Whether the recipe trusts the Python code in this model folder (``model.trust_remote_code``)."""
        return bool(self.facts.get("trust_remote_code", False))


@dataclass(frozen=True)
class StageResult:
    """What a stage hands back, besides the files in ``ctx.output``."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Final numbers, e.g. ``{"exact_match": 0.91}``; they go to MLflow, the manifest and the closing table."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that later steps, the plan or the manifest need, e.g. ``{"rank": 16}``."""


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may know about where it runs.

    Attributes:
        inputs: Finished artifacts by role (``model``, ``adapter``, ``dataset``, ...).
        output: Empty folder to write the artifact into; it is renamed into place when the stage
            returns.
        state: Folder that outlives a crash, for checkpoints and partial work of this very step.
        recipe_dir: Folder that relative paths of the recipe start from.
        device: ``cpu`` or ``cuda``.
        resume: Whether to go on from what is in ``state``.
        interpreters: Interpreters of the other environments this stage needs, by name (an
            engine's, for example).
    """

    inputs: Mapping[str, Input]
    output: Path
    state: Path
    recipe_dir: Path
    device: str = "cpu"
    resume: bool = True
    interpreters: Mapping[str, Interpreter] = field(default_factory=dict)
    events: IO[str] | None = None
    probe: bool = False
    """Only try out whether it fits: two steps on the worst batch, nothing is kept."""
    profile_steps: tuple[int, int] | None = None
    """First and last of the optimizer steps to record (``train/watch/profile.py``), counted from 1."""
    speaks: bool = True
    """Whether what is logged, shown and noted goes anywhere: on one of several ranks only."""

    def silent(self) -> Self:
        """The same for a process beside the one that speaks."""
        return replace(self, events=None, speaks=False)

    def log(self, step: int, **metrics: float) -> None:
        """Record metrics at a step: a line of ``metrics.jsonl``, and from there MLflow."""
        if not self.speaks:
            return
        line = json.dumps({"step": step, "time": time.time(), "metrics": metrics})
        with (self.output / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        self._emit("metrics", step=step, metrics=metrics)

    def progress(self, done: float, total: float, unit: str, **shown: float | str) -> None:
        """Move the progress line; ``shown`` values (loss, tokens/s) stand beside it. Total 0: unknown."""
        self._emit("progress", done=done, total=total, unit=unit, shown=shown)

    def note(self, text: str) -> None:
        """Say in one line what is going on or what the user should know."""
        self._emit("note", text=text)

    def _emit(self, event: str, **values: Any) -> None:
        if self.events is not None:
            self.events.write(json.dumps({"event": event, **values}) + "\n")
            self.events.flush()


C_contra = TypeVar("C_contra", bound=Section, contravariant=True)


class Stage(Protocol[C_contra]):
    """A verb: reads inputs, writes one artifact.

    ``C_contra`` is the type of its config, a frozen section that holds all the stage may read of the
    recipe. What stands in it is part of the step's fingerprint, but for the few keys that
    ``plan.UNIDENTIFIED`` names; what does not stand in it cannot change the result.
    """

    name: ClassVar[str]
    produces: ClassVar[Kind]
    revision: ClassVar[int]
    """Raise it when equal config and inputs start to give other bytes."""
    environment: ClassVar[str]
    """``core``, ``train`` or ``quantize``: where ``run`` runs."""

    def run(self, config: C_contra, ctx: StageContext) -> StageResult:
        """Do the work. Heavy imports stand inside. The user's mistakes are raised as ToolkitError."""
        ...


STAGES = Registry(
    "stage",
    {
        name: f"toolkit.stages.{name}:{name.capitalize()}"
        for name in (
            *("fetch", "data", "train", "export", "quantize", "reference"),
            *("evaluate", "serve", "choose"),
        )
    },
)
"""Stage classes by verb; each module also has the config type, ``<Verb>Config``."""

CONFIGS = Registry(
    "stage", {name: f"toolkit.stages.{name}:{name.capitalize()}Config" for name in STAGES}
)
