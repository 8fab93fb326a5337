"""MLflow's client, opened late and kept quiet: importing MLflow takes seconds."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from toolkit.errors import TrackingError
from toolkit.tracking.store import Store
from toolkit.workspace import private_folder

SETTINGS = {
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # we retry by ourselves, from disk; MLflow's own patience (7 retries of 120 s) would hide an
    # outage for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
"""Environment variables for MLflow in our processes, unless the user set them."""

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Makes the UI show an experiment as training, not as traces of an application."""


def connect(store: Store) -> Any:
    """An ``MlflowClient`` of ``store``; a new SQLite store gets its tables here, in seconds."""
    quiet()
    from mlflow.tracking import MlflowClient

    if store.sqlite_file:
        private_folder(store.sqlite_file.parent)
    return MlflowClient(store.uri)


def quiet() -> None:
    """Keep MLflow's log lines, progress bars and third-party warnings off the terminal."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
    warnings.filterwarnings("ignore", module=r"(alembic|sqlalchemy)(\.|$)")


def experiment_id(client: Any, store: Store, name: str) -> str:
    """The experiment ``name``, made if it is not there.

    Raises:
        TrackingError: It was deleted in the UI: MLflow takes no runs for it and keeps its name.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            root = private_folder(store.artifact_root) / name if store.artifact_root else None
            location = str(root) if root else None
            return str(client.create_experiment(name, artifact_location=location, tags=KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process made it in between
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"tracking store {store.shown}: the experiment {name!r} was deleted there",
            f"run `mlflow experiments restore -x {found.experiment_id}`, or set another one",
        )
    return str(found.experiment_id)
