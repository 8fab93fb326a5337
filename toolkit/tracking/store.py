"""Which MLflow store runs go to, and whether it can be opened; without importing MLflow."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import socket
import sqlite3
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from toolkit.errors import TrackingError
from toolkit.workspace import Workspace

TIMEOUT_S = 5.0
"""How long a store may take to answer before a run is refused."""

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Default ports of the database stores that MLflow knows."""


@dataclass(frozen=True)
class Store:
    """An MLflow tracking store.

    Attributes:
        uri: Tracking URI, absolute where it names a file.
        artifact_root: Folder for artifacts; ``None`` where the server decides.
        outboxes: Folder where runs keep what the store did not get yet.
    """

    uri: str
    artifact_root: Path | None
    outboxes: Path

    def described(self) -> dict[str, str | None]:
        """The store as JSON, without a password: that stays in ``MLFLOW_TRACKING_URI``."""
        root = None if self.artifact_root is None else str(self.artifact_root)
        return {"uri": self.shown, "artifact_root": root, "outboxes": str(self.outboxes)}

    @classmethod
    def read(cls, described: Mapping[str, str | None]) -> Self:
        """What :meth:`described` described, with its password if the environment has it."""
        uri, root = str(described["uri"]), described["artifact_root"]
        given = os.environ.get("MLFLOW_TRACKING_URI", "")
        whole = given if without_password(given) == uri else uri
        return cls(whole, None if root is None else Path(root), Path(str(described["outboxes"])))

    @property
    def shown(self) -> str:
        """The URI without its password, for messages and files."""
        return without_password(self.uri)

    @property
    def sqlite_file(self) -> Path | None:
        """The database file of a SQLite store."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:") else None


def resolve(recipe_uri: str | None, workspace: Workspace) -> Store:
    """The store: the recipe's, else ``MLFLOW_TRACKING_URI``, else SQLite in the workspace."""
    uri = recipe_uri or os.environ.get("MLFLOW_TRACKING_URI") or workspace.mlflow_uri
    outboxes = workspace.root / "tracking"
    if uri == workspace.mlflow_uri:
        return Store(uri, workspace.mlflow_artifacts, outboxes)
    if _scheme(uri) in ("http", "https", "databricks"):
        return Store(uri, None, outboxes)
    if _scheme(uri) == "sqlite":
        file = Path(uri.partition(":///")[2]).absolute()
        return Store(f"sqlite:///{file}", file.parent / "mlartifacts", outboxes)
    return Store(uri, workspace.mlflow_artifacts, outboxes)


def check(store: Store | str) -> None:
    """Raise :class:`TrackingError` within five seconds if the store cannot be opened."""
    uri = store if isinstance(store, str) else store.uri
    scheme = _scheme(uri)
    if scheme in ("http", "https"):
        _no_password(uri)
        _bounded(uri, lambda: _ask_server(uri))
    elif scheme == "sqlite":
        _open_sqlite(uri)
    elif scheme in DATABASE_PORTS:
        _bounded(uri, lambda: _reach_database(uri, scheme))
    elif scheme in ("", "file"):
        raise TrackingError(
            f"tracking store {uri}: MLflow 3 no longer writes plain folders",
            "use sqlite:///<file>.db, or `mlflow migrate-filestore` to bring an old folder along",
        )
    elif scheme != "databricks":
        known = "sqlite, http, https, postgresql, mysql, mssql, databricks"
        raise TrackingError(
            f"tracking store {without_password(uri)}: {scheme!r} is no scheme MLflow knows", known
        )


def without_password(uri: str) -> str:
    """``http://me:secret@host`` -> ``http://me@host``."""
    parts = urllib.parse.urlsplit(uri)
    if parts.password is None:
        return uri
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{parts.username}@{host}"))


def _no_password(uri: str) -> None:
    if urllib.parse.urlsplit(uri).password is not None:
        raise TrackingError(
            f"tracking server {without_password(uri)}: an address with a password ends up in files",
            "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


def _scheme(uri: str) -> str:
    if uri == "databricks":
        return uri
    head, found, _ = uri.partition(":")
    return head.partition("+")[0].lower() if found else ""


def _open_sqlite(uri: str) -> None:
    file = Path(uri.partition(":///")[2]).absolute()
    existing = next(p for p in (file, *file.parents) if p.exists())
    try:
        if existing == file:
            given = f"{file.as_uri()}?mode=rw"
            with contextlib.closing(
                sqlite3.connect(given, uri=True, timeout=TIMEOUT_S)
            ) as database:
                database.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise TrackingError(
            f"tracking store {file} cannot be opened: {error}",
            "move the file away to start a new store, or name another by tracking.uri",
        ) from error
    if existing != file and not existing.is_dir():
        raise TrackingError(
            f"tracking store {file} cannot be made: {existing} is not a folder", "set tracking.uri"
        )
    if not os.access(existing, os.W_OK):
        raise TrackingError(
            f"tracking store {file} cannot be written: no permission to write {existing}",
            "name a folder of your own by --workspace, or another store by tracking.uri",
        )


def _bounded(uri: str, ask: Callable[[], None]) -> None:
    """Run ``ask`` for at most TIMEOUT_S; a socket's time-out does not bound name look-up."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            ask()
            outcome.append(None)
        except (TrackingError, OSError, http.client.HTTPException, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="tracking-check", daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {TIMEOUT_S:g} s")
    if isinstance(error, TrackingError):
        raise error
    if error is not None:
        raise _unreachable(uri, error) from error


def _unreachable(uri: str, error: Exception) -> TrackingError:
    cause = getattr(error, "reason", None) or error
    return TrackingError(
        f"tracking server {without_password(uri)} cannot be reached: {cause}",
        "start it, or correct tracking.uri or MLFLOW_TRACKING_URI; without both, runs stay here",
    )


def _ask_server(uri: str) -> None:
    request = urllib.request.Request(  # noqa: S310 - the caller checked that the scheme is http or https
        f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1",
        headers=_authorization(),
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=_tls()) as answer:  # noqa: S310
            json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refused(uri, error) from error
    except ValueError as error:
        raise TrackingError(
            f"{without_password(uri)} answers, but not as an MLflow tracking server",
            "correct tracking.uri",
        ) from error


def _refused(uri: str, error: urllib.error.HTTPError) -> TrackingError:
    if error.code in (401, 403):
        hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    elif error.code == 404:
        hint = "is this the root URL of an MLflow server? correct tracking.uri"
    else:
        hint = "look into the server's log"
    return TrackingError(
        f"tracking server {without_password(uri)} answers {error.code} {error.reason}", hint
    )


def _authorization() -> dict[str, str]:
    """The header that MLflow's own client would send."""
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        return {
            "Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        }
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _reach_database(uri: str, scheme: str) -> None:
    parts = urllib.parse.urlsplit(uri)
    with socket.create_connection(
        (parts.hostname or "localhost", parts.port or DATABASE_PORTS[scheme]), TIMEOUT_S
    ):
        pass
