"""Which adapters a server is to have: a value with pure changes, and the file that it survives in.

Public names stay; names inside the engine carry the version, so two versions of one adapter can be loaded together::

    tickets ── stable 0.9 ── tickets@1a2b3c4d5e6f7081
            └─ canary 0.1 ── tickets@0f9e8d7c6b5a4938
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolkit import digests
from toolkit.engines import Adapter
from toolkit.errors import ArtifactError, UsageError
from toolkit.gateway.table import Route, Target
from toolkit.registry import close_match
from toolkit.serving.state import VERSION_SHOWN, AdapterSpec

STABLE, CANARY = "stable", "canary"


def read_spec(
    name: str, folder: Path, source: str | None = None, registered: str | None = None
) -> AdapterSpec:
    """Look at an adapter folder.

    Raises:
        EngineError: It is not a LoRA adapter.
    """
    Adapter.read(name, folder)
    return AdapterSpec(
        name=name,
        path=str(folder),
        version=digests.of_path(folder)[:VERSION_SHOWN],
        run_id=_run_of(folder),
        source=source or str(folder),
        registered=registered,
    )


def ensure_unchanged(spec: AdapterSpec) -> None:
    """Raise :class:`ArtifactError` unless the folder still holds the bytes that the version stands for."""
    folder = spec.place
    now = digests.of_path(folder)[:VERSION_SHOWN] if folder.is_dir() else None
    if now != spec.version:
        became = "is gone" if now is None else f"has digest {now} now"
        raise ArtifactError(
            f"adapter {spec.lora_name}: {folder} {became}",
            f"bring the folder back, or give it another: toolkit adapters swap {spec.name} SOURCE",
        )


def _run_of(folder: Path) -> str | None:
    try:
        reference = json.loads((folder / "manifest.json").read_text())["mlflow"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reference.get("run_id") if isinstance(reference, dict) else None


@dataclass(frozen=True)
class Desired:
    """All versions, in the order they came; the stable one of a name before its canary. Changes make a new value."""

    specs: tuple[AdapterSpec, ...] = ()

    @property
    def names(self) -> list[str]:
        """Public names."""
        return list(dict.fromkeys(spec.name for spec in self.specs))

    @property
    def by_lora_name(self) -> dict[str, AdapterSpec]:
        """Versions by their name inside the engine."""
        return {spec.lora_name: spec for spec in self.specs}

    def of(self, name: str) -> tuple[AdapterSpec, ...]:
        """Variants of a public name.

        Raises:
            UsageError: There is no such name.
        """
        found = tuple(spec for spec in self.specs if spec.name == name)
        if not found:
            raise UsageError(
                f"no adapter is named {name!r}{close_match(name, self.names)}",
                f"loaded: {', '.join(self.names) or 'none'}",
            )
        return found

    def load(self, spec: AdapterSpec) -> Desired:
        """A new public name.

        Raises:
            UsageError: The name is taken.
        """
        if spec.name in self.names:
            raise UsageError(
                f"an adapter named {spec.name!r} is loaded already",
                f"replace it with `toolkit adapters swap {spec.name} SOURCE`",
            )
        return Desired((*self.specs, replace(spec, label=STABLE, weight=1.0)))

    def unload(self, name: str) -> Desired:
        """Without a public name.

        Raises:
            UsageError: There is none.
        """
        self.of(name)
        return Desired(tuple(spec for spec in self.specs if spec.name != name))

    def swap(self, spec: AdapterSpec, label: str = STABLE) -> Desired:
        """Another version of one variant; the others stay.

        Both may come to be one version: that is how a canary becomes stable by alias.

        Raises:
            UsageError: No such adapter or variant.
        """
        old = self._variant(spec.name, label)
        new = replace(spec, label=old.label, weight=old.weight)
        return Desired(tuple(new if s is old else s for s in self.specs))

    def canary(self, spec: AdapterSpec, weight: float, label: str = CANARY) -> Desired:
        """A second version that gets ``weight`` (0 to 1) of the requests, and those that ask for ``label``.

        Raises:
            UsageError: No such adapter, it has a canary already, or the canary is the stable version.
        """
        stable, *others = self.of(spec.name)
        if others:
            raise UsageError(
                f"{spec.name!r} has a canary already: {others[0].lora_name}",
                f"end it first: toolkit adapters promote {spec.name}, or toolkit adapters abort {spec.name}",
            )
        _refuse_twin(spec, stable)
        pair = (replace(stable, weight=1 - weight), replace(spec, label=label, weight=weight))
        return self._replaced(spec.name, pair)

    def promote(self, name: str) -> Desired:
        """The canary becomes the stable version."""
        return self._replaced(name, (replace(self._canary(name), label=STABLE, weight=1.0),))

    def abort(self, name: str) -> Desired:
        """The canary goes."""
        self._canary(name)
        return self._replaced(name, (replace(self.of(name)[0], weight=1.0),))

    def routes(self, model_id: Callable[[AdapterSpec], str]) -> tuple[Route, ...]:
        """What the front is told; ``model_id`` says what a request to the engine writes as ``model``."""
        return tuple(
            Route(name, tuple(_target(spec, model_id(spec)) for spec in self.of(name)))
            for name in self.names
        )

    def _variant(self, name: str, label: str) -> AdapterSpec:
        variants = self.of(name)
        for spec in variants:
            if spec.label == label:
                return spec
        labels = ", ".join(spec.label for spec in variants)
        raise UsageError(f"{name!r} has no variant {label!r}", f"it has: {labels}")

    def _canary(self, name: str) -> AdapterSpec:
        variants = self.of(name)
        if len(variants) < 2:
            raise UsageError(
                f"{name!r} has no canary", f"start one: toolkit adapters canary {name} SOURCE"
            )
        return variants[1]

    def _replaced(self, name: str, variants: Sequence[AdapterSpec]) -> Desired:
        """The variants of ``name`` exchanged, in their place."""
        specs: list[AdapterSpec] = []
        for other in self.names:
            specs += variants if other == name else self.of(other)
        return Desired(tuple(specs))


def _target(spec: AdapterSpec, model_id: str) -> Target:
    return Target(
        model_id=model_id,
        kind="adapter",
        version=spec.version,
        label=spec.label,
        weight=spec.weight,
        run_id=spec.run_id,
        source=spec.registered or spec.source,
    )


def _refuse_twin(spec: AdapterSpec, stable: AdapterSpec) -> None:
    if stable.version == spec.version:
        raise UsageError(
            f"{spec.source} is {spec.lora_name}, which is the stable version already",
            "give a folder with other weights",
        )


@dataclass(frozen=True)
class Memory:
    """The file ``adapters.json`` of a server: what it is to have, and what the recipe said at that time."""

    file: Path
    watched: bool = False
    """Whether the server follows aliases: then an entry of the recipe that names one stays the same when it moves, and
    the server starts with what it had; following the alias comes later, with its proof."""

    def recall(self, recipe: Desired) -> Desired:
        """What to start with: what was there last, but where the recipe speaks anew, the recipe.

        A name whose part of the recipe did not change keeps what commands and aliases made of it since. A name that
        the recipe changed, added or dropped follows the recipe.

        Raises:
            ArtifactError: The file cannot be read.
        """
        try:
            values = json.loads(self.file.read_text())
            said, now = _read(values["recipe"]), _read(values["adapters"])
        except FileNotFoundError:
            return recipe
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{self.file} cannot be read: {error!r}",
                "remove it; the server then starts with the adapters of the recipe",
            ) from error
        return merged(said, recipe, now, watched=self.watched)

    def keep(self, recipe: Desired, now: Desired) -> None:
        """Write the file: whole or not at all, on disk when this returns.

        Raises:
            ArtifactError: It cannot be written.
        """
        values = {"schema": 1, "recipe": _plain(recipe), "adapters": _plain(now)}
        part = self.file.with_suffix(".part")
        try:
            with part.open("w") as file:
                json.dump(values, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.file)
        except OSError as error:
            raise ArtifactError(
                f"{self.file} cannot be written: {error.strerror}",
                "make room there; without it, adapters would be others after a restart",
            ) from error


def merged(said: Desired, recipe: Desired, now: Desired, *, watched: bool = False) -> Desired:
    """Three ways: what the recipe ``said``, what it says, and what the server had ``now``."""
    specs: list[AdapterSpec] = []
    for name in dict.fromkeys((*recipe.names, *now.names)):
        same = _meaning(said, name, watched) == _meaning(recipe, name, watched)
        specs += [spec for spec in (now if same else recipe).specs if spec.name == name]
    return Desired(tuple(specs))


def follows_alias(spec: AdapterSpec) -> bool:
    """Whether it came from ``models:/name@alias``."""
    return spec.registered is not None and "@" in (spec.source or "")


def _meaning(desired: Desired, name: str, watched: bool) -> list[tuple[str | None, str, float]]:
    """What makes two entries of a recipe the same; a folder may have moved."""
    return [
        (s.source if watched and follows_alias(s) else s.version, s.label, s.weight)
        for s in desired.specs
        if s.name == name
    ]


def _plain(desired: Desired) -> list[dict[str, Any]]:
    return [asdict(spec) for spec in desired.specs]


def _read(specs: Sequence[Mapping[str, Any]]) -> Desired:
    return Desired(tuple(AdapterSpec(**spec) for spec in specs))
