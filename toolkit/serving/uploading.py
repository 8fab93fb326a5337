"""An exported adapter on its way into the MLflow registry: with its run, fingerprint and digest as tags."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from toolkit.artifact import Artifact
from toolkit.stages import Kind
from toolkit.tracking import client as mlflow_client
from toolkit.tracking.store import Store

DIGEST, FINGERPRINT, RUN = "toolkit.digest", "toolkit.fingerprint", "toolkit.run_id"
"""Tags of a version."""


@dataclass(frozen=True)
class Upload:
    """One adapter and the store that it goes to. What MLflow raises is the caller's to catch.

    Attributes:
        client: ``mlflow.MlflowClient``.
        made: The artifact, verified.
        digest: sha256 over its files.
    """

    client: Any
    store: Store
    made: Artifact
    digest: str

    def known_as(self, name: str) -> str | None:
        """The newest version of ``name`` with these very bytes."""
        query = f"name = '{name}' and tags.`{DIGEST}` = '{self.digest}'"
        found = self.client.search_model_versions(query)
        return str(max(int(one.version) for one in found)) if found else None

    def add_to(self, name: str) -> str:
        """The new version of ``name``, in the logged model of the step's run: lineage leads from data to version."""
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it is there
            self.client.create_registered_model(name)
        model = self._logged_model()
        self.client.log_model_artifacts(model.model_id, str(self.made.path))
        run_id = run_of(self.made) if model.source_run_id else None
        version = self.client.create_model_version(
            name, model.artifact_location, run_id=run_id, tags=self._tags(model.model_id, run_id)
        )
        return str(version.version)

    def _tags(self, model_id: str, run_id: str | None) -> dict[str, str]:
        manifest = self.made.manifest
        facts = manifest.get("facts", {})
        tags = {
            DIGEST: self.digest,
            FINGERPRINT: self.made.fingerprint,
            "toolkit.kind": Kind.adapter.value,
            "toolkit.recipe": str(manifest.get("recipe", "")),
            "toolkit.model_id": model_id,
        }
        tags |= {RUN: run_id} if run_id else {}
        return tags | {
            f"toolkit.{k}": str(facts[k]) for k in ("rank", "base_fingerprint") if k in facts
        }

    def _logged_model(self) -> Any:
        run = self._run(run_of(self.made))
        outputs = run.outputs.model_outputs if run and run.outputs else ()
        if outputs:
            return self.client.get_logged_model(outputs[0].model_id)
        recipe = str(self.made.manifest.get("recipe", "adapters"))
        model = self.client.create_logged_model(
            mlflow_client.experiment_id(self.client, self.store, recipe),
            name=f"{recipe}-adapter",
            source_run_id=run.info.run_id if run else None,
            model_type=Kind.adapter.value,
        )
        return self.client.finalize_logged_model(model.model_id, "READY")

    def _run(self, run_id: str | None) -> Any:
        """The run that made the artifact; ``None`` where this store does not know it."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id) if run_id else None
        except MlflowException:
            return None


def run_of(made: Artifact) -> str | None:
    """MLflow run that made an artifact, by its manifest."""
    reference = made.manifest.get("mlflow") or {}
    return reference.get("run_id")
