"""Where an adapter comes from: a folder or the registry. Whatever it is, the server keeps bytes that do not change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from toolkit import digests
from toolkit.errors import UsageError
from toolkit.recipe.adapters import REGISTRY
from toolkit.recipe.paths import resolve_path
from toolkit.recipe.serve import ServeSection
from toolkit.serving.desired import STABLE, read_spec
from toolkit.serving.registry import ModelRegistry
from toolkit.serving.state import VERSION_SHOWN, AdapterSpec
from toolkit.workspace import Workspace, private_folder

NOTHING: Mapping[str, Path] = {}


def bring(
    name: str,
    source: str,
    directory: Path,
    registry: ModelRegistry,
    made: Path | None = None,
) -> AdapterSpec:
    """Bring an adapter to a place where it stays as it is, and say what it is.

    Args:
        name: Public name.
        source: A folder, ``models:/name@alias`` or ``models:/name/3``.
        directory: Where a relative folder starts.
        registry: Of the store that ``models:/`` means.
        made: An artifact with the same weights and a ``reference.json``, where the folder brings none.

    Raises:
        UsageError: There is no such folder.
        EngineError: It is not a LoRA adapter.
        TrackingError: The store does not know it, or is away.
        ArtifactError: It is damaged.
    """
    if source.startswith(REGISTRY):
        registered = registry.resolve(source)
        return read_spec(name, registry.fetch(registered), source, registered.uri)
    folder = resolve_path(source, directory).resolve()
    if made is not None:
        return read_spec(name, made, str(folder))
    if not folder.is_dir():
        raise UsageError(
            f"adapter {name!r}: {folder} is not a folder", "give a folder or models:/NAME@ALIAS"
        )
    spec = read_spec(name, folder, source)
    return read_spec(name, _kept(folder, spec.version, registry.workspace), str(folder))


def of_recipe(
    serve: ServeSection,
    trained: AdapterSpec | None,
    directory: Path,
    registry: ModelRegistry,
    made: Mapping[str, Path] = NOTHING,
) -> tuple[AdapterSpec, ...]:
    """Every adapter that a recipe serves: the trained one first.

    ``made`` has artifacts of those that brought no reference, by name (``NAME HEADER`` for a canary). Raises like
    :func:`bring`.
    """
    finished = _finished(serve, directory, registry, made)
    return (*((trained,) if trained else ()), *finished)


def _finished(
    serve: ServeSection, directory: Path, registry: ModelRegistry, made: Mapping[str, Path]
) -> Iterator[AdapterSpec]:
    from dataclasses import replace

    for section in serve.adapters:
        name, canary = section.name, section.canary
        spec = bring(name, section.path, directory, registry, made.get(name))
        yield replace(spec, label=STABLE, weight=1 - canary.weight if canary else 1.0)
        if canary:
            other = made.get(f"{name} {canary.header}")
            beside = bring(name, canary.path, directory, registry, other)
            yield replace(beside, label=canary.header, weight=canary.weight)


def _kept(folder: Path, version: str, workspace: Workspace) -> Path:
    """A folder that nobody writes into: artifacts as they are, every other one as a copy."""
    if any(folder.is_relative_to(workspace.root / own) for own in ("artifacts", "adapters")):
        return folder
    place = private_folder(workspace.root / "adapters") / version
    if place.is_dir() and digests.of_path(place)[:VERSION_SHOWN] == version:
        return place
    part = place.with_name(f"{version}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns(".*"))
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)
    return place
