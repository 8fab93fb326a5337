"""Adapters in the MLflow model registry: put there, found by alias, brought here by version, and told how they fared.

A version is brought into ``<workspace>/registry/<name>/<version>/`` whole and verified, or not at all. What an alias
meant last is remembered beside it, so that a server starts while the store is away.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit import artifact, digests
from toolkit.errors import ArtifactError, ToolkitError, TrackingError
from toolkit.recipe.adapters import parse_registered
from toolkit.serving.state import ServerSpec
from toolkit.serving.uploading import DIGEST, RUN, Upload, run_of
from toolkit.stages import Kind
from toolkit.tracking import client as mlflow_client
from toolkit.tracking.store import Store, check, resolve
from toolkit.workspace import Workspace, private_folder

TAG_LIMIT = 4000
"""Characters of a tag's value that MLflow keeps for certain."""


@dataclass(frozen=True)
class Registered:
    """One version of a registered adapter.

    Attributes:
        name: Of the registered model.
        version: Its number.
        digest: sha256 over the folder's files, from a tag; ``None`` when something else than us registered it.
        run_id: MLflow run that made it.
    """

    name: str
    version: str
    digest: str | None = None
    run_id: str | None = None

    @property
    def uri(self) -> str:
        """``models:/name/3``."""
        return f"models:/{self.name}/{self.version}"


@dataclass
class ModelRegistry:
    """The registry of one store. Importing MLflow takes seconds, so it is opened when it is first asked.

    Every method raises TrackingError when the store does not answer or refuses.
    """

    store: Store
    workspace: Workspace
    _client: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, spec: ServerSpec) -> ModelRegistry:
        """The registry of a server: its store's, else that of its workspace."""
        workspace = Workspace(spec.place.parent.parent)
        store = Store.read(spec.store) if spec.store else resolve(None, workspace)
        return cls(store, workspace)

    def resolve(self, source: str, *, remembered: bool = True) -> Registered:
        """What ``models:/name@alias`` means now, or ``models:/name/3``.

        Args:
            source: As above.
            remembered: While the store is away, take what it meant last, if that is here.

        Raises:
            TrackingError: The store has no such alias or version, or it is away.
        """
        name, version, alias = parse_registered(source)
        try:
            with self._asked(source) as client:
                found = (
                    client.get_model_version_by_alias(name, alias)
                    if alias
                    else client.get_model_version(name, version)
                )
        except _AwayError:
            if not remembered:
                raise
            return self._remembered(source)
        tags = dict(found.tags or {})
        run_id = tags.get(RUN) or found.run_id or None
        registered = Registered(name, str(found.version), tags.get(DIGEST), run_id)
        self._remember(source, registered)
        return registered

    def fetch(self, registered: Registered) -> Path:
        """Bring a version here, verified; one that is here already is verified again.

        Raises:
            ArtifactError: What came is not what was registered, or is no adapter.
        """
        folder = self._place(registered.name) / registered.version
        if folder.is_dir() and _digest_problem(folder, registered) is None:
            return folder
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")  # a command may fetch it too
        shutil.rmtree(part, ignore_errors=True)
        private_folder(part)
        with self._asked(registered.uri) as client:
            from mlflow.artifacts import download_artifacts

            came = Path(
                download_artifacts(
                    artifact_uri=client.get_model_version_download_uri(
                        registered.name, registered.version
                    ),
                    dst_path=str(part),
                    tracking_uri=self.store.uri,
                )
            )
        adapter = _adapter_below(came, registered)
        if problem := _digest_problem(adapter, registered):
            shutil.rmtree(part)
            raise ArtifactError(
                f"{registered.uri} is damaged: {problem}",
                "register it again: toolkit adapters register ARTIFACT --name "
                f"{registered.name} --alias ALIAS",
            )
        shutil.rmtree(folder, ignore_errors=True)
        try:
            adapter.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker, with the same bytes
                raise
        shutil.rmtree(part, ignore_errors=True)
        return folder

    def register(self, folder: Path, name: str, alias: str | None) -> Registered:
        """Upload an exported adapter as a version of ``name`` and move ``alias`` to it.

        An adapter that is a version already is not uploaded again; its alias is moved.

        Raises:
            ArtifactError: The folder is no exported adapter, or it is damaged.
        """
        made = exported(folder)
        digest = digests.of_path(folder)
        with self._asked(name) as client:
            upload = Upload(client, self.store, made, digest)
            version = upload.known_as(name) or upload.add_to(name)
            if alias:
                client.set_registered_model_alias(name, alias, version)
        return Registered(name, version, digest, run_of(made))

    def tag(self, name: str, version: str, key: str, value: str) -> None:
        """Say something about a version where everybody sees it."""
        with self._asked(f"models:/{name}/{version}") as client:
            client.set_model_version_tag(name, version, key, value[:TAG_LIMIT])

    @contextlib.contextmanager
    def _asked(self, what: str) -> Iterator[Any]:
        """A client; what goes wrong with it becomes a TrackingError."""
        try:
            check(self.store)
        except TrackingError as error:
            raise _AwayError(error.message, error.hint) from error
        self._client = self._client or mlflow_client.connect(self.store)
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield self._client
        except MlflowException as error:
            known = error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
            raise (TrackingError if known else _AwayError)(
                f"{what}: {self.store.shown} says: {error.message}",
                "look at the registry: toolkit ui" if known else "is the store up?",
            ) from error
        except (OSError, SQLAlchemyError) as error:  # artifacts travel by requests and by files
            raise _AwayError(f"{what}: {self.store.shown}: {error}", "is the store up?") from error

    def _place(self, name: str) -> Path:
        return private_folder(
            self.workspace.root / "registry" / urllib.parse.quote(name, safe=" @")
        )

    def _remember(self, source: str, found: Registered) -> None:
        file = self._place(found.name) / "meant.json"
        known = _read(file)
        if known.get(source) == vars(found):
            return
        known[source] = vars(found)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(known, indent=1))
        part.replace(file)

    def _remembered(self, source: str) -> Registered:
        name, _, _ = parse_registered(source)
        known = _read(self._place(name) / "meant.json").get(source)
        if known is None or not (self._place(name) / known["version"]).is_dir():
            raise TrackingError(
                f"{source}: {self.store.shown} does not answer, and this version was never here",
                "start the store, or give a folder",
            )
        return Registered(**known)


class _AwayError(TrackingError):
    """The store does not answer; another time it may."""


def is_away(error: ToolkitError) -> bool:
    """Whether an error says nothing about the adapter, only that the store did not answer."""
    return isinstance(error, _AwayError)


def exported(folder: Path) -> artifact.Artifact:
    """The artifact of an exported adapter, every file checked.

    Raises:
        ArtifactError: There is none, it is damaged, or it is something else.
    """
    made = artifact.verified(folder)
    if made.manifest.get("kind") != Kind.adapter or not (folder / "adapter_config.json").is_file():
        raise ArtifactError(
            f"{folder} holds a {made.manifest.get('kind')}, not an adapter",
            "register what the step export-adapter made",
        )
    return made


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _adapter_below(root: Path, registered: Registered) -> Path:
    """The one adapter folder in what MLflow holds: flavours put it at different depths."""
    found = sorted(file.parent for file in root.rglob("adapter_config.json"))
    if len(found) != 1:
        raise ArtifactError(
            f"{registered.uri} holds {len(found)} adapters, not one",
            "register an exported adapter: toolkit adapters register ARTIFACT --name NAME",
        )
    return found[0]


def _digest_problem(folder: Path, registered: Registered) -> str | None:
    """What is wrong with a copy; a version that somebody else registered is compared with its own manifest, if any."""
    if registered.digest is None:
        made = artifact.find(folder)
        return artifact.damage(made, thorough=True) if made else None
    now = digests.of_path(folder)
    if now == registered.digest:
        return None
    made = artifact.find(folder)
    detail = artifact.damage(made, thorough=True) if made else None
    return detail or f"its digest is {now[:16]}, but {registered.digest[:16]} was registered"
