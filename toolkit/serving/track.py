"""A start as an MLflow run of its own: phases, certificate, versions. A lost store never stops a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from toolkit import __version__
from toolkit.serving.state import ServerSpec
from toolkit.tracking import Store
from toolkit.tracking.run import TrackedRun


class StartRun:
    """The run of one start; every method returns at once.

    Args:
        spec: The server; without a store nothing is written.
    """

    def __init__(self, spec: ServerSpec) -> None:
        self._spec = spec
        self._run: TrackedRun | None = None
        self._ending: threading.Thread | None = None
        if spec.store is None:
            return
        store = Store.read(spec.store)
        self._run = TrackedRun(store, spec.experiment, f"serve-live-{spec.name}", _tags(spec))
        self._run.params({"serve": dict(spec.serve), "device": spec.device})

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, once the store gave one."""
        return self._run.run_id if self._run else None

    def ready(self, url: str, startup: Mapping[str, float], certificate: Mapping[str, Any]) -> None:
        """The server is ready: metrics ``startup.PHASE`` in seconds, ``certificate.json``."""
        if self._run is None:
            return
        self._run.tag({"toolkit.url": url, "toolkit.certificate": str(certificate.get("id", ""))})
        self._run.log(0, {f"startup.{phase}": seconds for phase, seconds in startup.items()})
        self._run.text("certificate.json", json.dumps(certificate, indent=2, default=str))
        self._end(None)

    def failed(self, error: BaseException) -> None:
        """The server did not start."""
        self._end(error)

    def close(self) -> None:
        """Wait until the store has it, ten seconds at most; what it misses is replayed later."""
        if self._ending is None:
            self._end(KeyboardInterrupt())
        if self._ending is not None:
            self._ending.join()

    def _end(self, error: BaseException | None) -> None:
        """In a thread of its own: the end of a run waits for the store."""
        run = self._run
        if run is None or self._ending is not None:
            return
        self._ending = threading.Thread(
            target=run.__exit__, args=(type(error), error, None), name="mlflow-end"
        )
        self._ending.start()


def _tags(spec: ServerSpec) -> dict[str, str]:
    tags = {
        "toolkit.kind": "serve",
        "stage": "serve-live",
        "toolkit.recipe": spec.recipe,
        "toolkit.subject": spec.subject,
        "toolkit.engine": spec.section.engine,
        "toolkit.version": __version__,
        "toolkit.model": spec.model_version,
        "toolkit.model_run": spec.model_run or "",
        "toolkit.environment": spec.engine_digest or "",
    }
    if spec.why:
        tags |= {"toolkit.choice": spec.subject, "toolkit.choice.why": spec.why}
    return tags | {f"toolkit.adapter.{a.name}": a.version for a in spec.adapters}
