"""Artifacts: folders that are complete or absent, with a manifest that says what they are and where they came from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import digests
from toolkit.errors import ArtifactError
from toolkit.stages import Input, Kind

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """The full fingerprint of the step that made it."""
        return str(self.manifest["fingerprint"])

    @property
    def metrics(self) -> dict[str, float]:
        """Final numbers of the step."""
        return dict(self.manifest["metrics"])

    def as_input(self) -> Input:
        """This artifact as a stage sees it."""
        return Input(
            self.path, Kind(self.manifest["kind"]), self.fingerprint, self.manifest["facts"]
        )


def find(path: Path) -> Artifact | None:
    """The artifact at ``path``; None where there is none.

    Raises:
        ArtifactError: A folder is there, but its manifest cannot be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path / MANIFEST} cannot be read: {error}", f"remove it: rm -r {path}"
        ) from error
    return Artifact(path, manifest)


def damage(artifact: Artifact, *, thorough: bool = False) -> str | None:
    """What is wrong with an artifact's files, in one line; None when nothing is.

    Args:
        artifact: The artifact.
        thorough: Compare digests too, not only presence and size. Unchanged files are not read
            again.
    """
    for name, known in artifact.manifest["files"].items():
        file = artifact.path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known["size"]:
            return f"{name} has {file.stat().st_size} bytes, not {known['size']}"
        if thorough and (now := digests.of_file(file)) != known["sha256"]:
            return f"{name} has sha256 {now[:12]}…, not {known['sha256'][:12]}…"
    return None


def verified(path: Path) -> Artifact:
    """The artifact at ``path``, every file checked.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    artifact = find(path)
    if artifact is None:
        raise ArtifactError(f"no artifact at {path}", "run the plan again: it will be made")
    if problem := damage(artifact, thorough=True):
        raise ArtifactError(
            f"the artifact at {path} is damaged: {problem}",
            f"remove it and run again: rm -r {path}",
        )
    return artifact


def part_of(path: Path) -> Path:
    """The folder that becomes ``path`` when it is complete."""
    return path.with_name(path.name + ".part")


def publish(path: Path, manifest: Mapping[str, Any]) -> Artifact:
    """Hash the files of ``path``'s part, write the manifest, and rename it into place in one step."""
    part = part_of(path)
    complete = dict(manifest) | {"files": digests.of_folder(part)}
    (part / MANIFEST).write_text(json.dumps(complete, indent=1, sort_keys=True))
    for file in part.rglob("*"):
        if file.is_file():
            _flush(file)
    if path.exists():  # only a damaged artifact can stand here: the step's lock is ours
        shutil.rmtree(path)
    part.rename(path)
    _flush(path.parent)
    return Artifact(path, complete)


def _flush(path: Path) -> None:
    """Make sure that bytes are on disk before the name says that they are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
