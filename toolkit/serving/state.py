"""What a running server is told and what it says of itself: plain values, JSON on disk and on the control socket."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from toolkit.engines import Adapter, Deployment, quantization_of
from toolkit.recipe.serve import ServeSection
from toolkit.stages import Interpreter

DEPLOYMENT_FILE = "deployment.json"
VERSION_SHOWN = 16
"""Hex digits of a digest that name a version of weights."""


@dataclass(frozen=True)
class AdapterSpec:
    """One version of an adapter under its public name.

    Attributes:
        name: What clients ask for; stays the same over versions.
        path: Folder of the adapter.
        version: First 16 hex digits of the folder's digest.
        label: Name of the variant: ``stable``, ``canary``.
        weight: Share of the traffic relative to the other versions of ``name``.
        run_id: MLflow run that made it, where known.
        source: ``models:/name@alias``, or the folder that the user named.
        registered: ``models:/name/3`` where it came from the registry.
    """

    name: str
    path: str
    version: str
    label: str = "stable"
    weight: float = 1.0
    run_id: str | None = None
    source: str | None = None
    registered: str | None = None

    @property
    def lora_name(self) -> str:
        """Its name inside the engine: two versions of one public name can be loaded together."""
        return f"{self.name}@{self.version}"

    @property
    def place(self) -> Path:
        """``path`` as a path."""
        return Path(self.path)

    def as_adapter(self) -> Adapter:
        """As an engine loads it at its start.

        Raises:
            EngineError: The folder is not a LoRA adapter.
        """
        return Adapter.read(self.lora_name, Path(self.path))


@dataclass(frozen=True)
class InterpreterSpec:
    """An interpreter as JSON."""

    python: str
    pythonpath: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, interpreter: Interpreter) -> Self:
        """From the value that environments give."""
        paths = tuple(map(str, interpreter.pythonpath))
        return cls(str(interpreter.python), paths, dict(interpreter.variables))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """From JSON."""
        return cls(values["python"], tuple(values["pythonpath"]), values["variables"])

    def interpreter(self) -> Interpreter:
        """The value that starts processes."""
        return Interpreter(Path(self.python), tuple(map(Path, self.pythonpath)), self.variables)


@dataclass(frozen=True)
class ServerSpec:
    """Everything that decides a server: written by ``toolkit serve``, read by its supervisor.

    Attributes:
        name: Name of the server, and the public name of its subject.
        subject: ``base``, ``tuned``, ``merged`` or a quantized one.
        why: Why this one, with the numbers, where ``serve.prefer`` decided.
        folder: Where the server's files lie (0700): this file, logs, the certificate, the desired adapters.
        model: Folder of the base or of a complete model.
        model_version: First 16 hex digits of the fingerprint of what made ``model``.
        model_run: MLflow run that made it.
        draft: Folder of the model that guesses for speculative decoding.
        base_name: Public name of what lies in ``model``; stays when adapters come and go.
        adapters: What is loaded at the first start; afterwards the adapter set decides.
        serve: The recipe's section, as JSON.
        store: MLflow store as ``Store.described`` gives it; ``None`` logs nothing.
        engine_digest: Digest of the lock (or the profile's entry) of the engine's environment.
    """

    name: str
    subject: str
    folder: str
    model: str
    model_version: str
    base_name: str
    max_length: int
    device: str
    serve: Mapping[str, Any]
    engine: InterpreterSpec
    router: InterpreterSpec | None = None
    adapters: tuple[AdapterSpec, ...] = ()
    model_run: str | None = None
    draft: str | None = None
    trust_remote_code: bool = False
    engine_digest: str | None = None
    keys_file: str | None = None
    store: Mapping[str, str | None] | None = None
    experiment: str = "toolkit"
    recipe: str = ""
    recipe_dir: str = "."
    detached: bool = False
    why: str = ""
    tuning: Mapping[str, float] = field(default_factory=dict)
    """Values of ``parts.Health`` that differ from its own."""

    @property
    def section(self) -> ServeSection:
        """The recipe's section."""
        return ServeSection.model_validate(self.serve)

    @property
    def place(self) -> Path:
        """``folder`` as a path."""
        return Path(self.folder)

    def deployment(self, adapters: tuple[AdapterSpec, ...]) -> Deployment:
        """What one engine of this server is started with.

        Raises:
            EngineError: A folder is not what it should be.
        """
        template = Path(self.model) / "chat_template.jinja"
        return Deployment(
            model=Path(self.model),
            name=self.name,
            max_length=self.max_length,
            device=self.device,
            serve=self.section,
            adapters=tuple(adapter.as_adapter() for adapter in adapters),
            chat_template=template if template.is_file() else None,
            draft=Path(self.draft) if self.draft else None,
            quantization=quantization_of(Path(self.model)),
            trust_remote_code=self.trust_remote_code,
            served_as=self.base_name,
        )

    def with_room(self, adapters: tuple[AdapterSpec, ...]) -> Self:
        """With room for ``adapters`` and for those of the recipe, which may come back: fixed for as long as it runs.

        An engine that restarts after its last adapter was unloaded still takes the next one.

        Args:
            adapters: What the server begins with.

        Raises:
            EngineError: A folder is not a LoRA adapter.
        """
        section, every = self.section, {*adapters, *self.adapters}
        if not (every and section.live_adapters):
            return self
        slots = max(len(adapters), len(self.adapters)) + 1
        ranks = (adapter.as_adapter().rank for adapter in every)
        room = {
            "max_rank": section.max_rank or max(ranks),
            "adapter_slots": section.adapter_slots or slots,
        }
        return replace(self, serve={**self.serve, **room})

    def write(self) -> Path:
        """Write ``deployment.json`` for its owner alone; return its path."""
        file = self.place / DEPLOYMENT_FILE
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            json.dump(asdict(self), out, indent=1)
        return file

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what :meth:`write` wrote."""
        values = json.loads((folder / DEPLOYMENT_FILE).read_text())
        for key in ("engine", "router"):
            values[key] = values[key] and InterpreterSpec.read(values[key])
        values["adapters"] = tuple(AdapterSpec(**entry) for entry in values["adapters"])
        return cls(**values)


@dataclass(frozen=True)
class Endpoint:
    """One healthy engine: where it listens, on loopback. ``generation`` counts its starts."""

    index: int
    url: str
    generation: int


@dataclass(frozen=True)
class PartState:
    """One process of a server, for ``--status``."""

    name: str
    """``front``, ``router``, ``replica-0``."""
    state: str
    """``starting``, ``proving``, ``ready``, ``waiting`` (for its next start), ``stopped``."""
    pid: int | None = None
    restarts: int = 0
    url: str | None = None
    detail: str | None = None
    """Phase of the start, or why the last one ended."""


@dataclass(frozen=True)
class ServerStatus:
    """What ``GET /status`` of the control socket says."""

    name: str
    url: str | None
    ready: bool
    reason: str | None
    models: tuple[str, ...]
    engine: str
    pid: int
    parts: tuple[PartState, ...] = ()
    in_flight: Mapping[str, int] = field(default_factory=dict)
    """Open requests by the engine's name of what answers: ``tickets@1a2b3c4d5e6f7081``."""
    startup: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase of the last complete start."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``asdict`` wrote."""
        parts = tuple(PartState(**part) for part in values["parts"])
        return cls(**{**values, "parts": parts, "models": tuple(values["models"])})
