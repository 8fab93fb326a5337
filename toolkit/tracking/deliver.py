"""Bring an outbox to MLflow: in order, once each, also across crashes of either side.

A record counts as delivered when MLflow said so. Before each call ``in_doubt`` is written down; if
it still stands when delivery goes on (the answer was lost, or we were killed), what arrived is read
back first. Nothing relies on a store that drops equal rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from toolkit.tracking import client as mlflow_client
from toolkit.tracking.outbox import FIRST_WORDS, LAST_WORDS, Outbox, Record
from toolkit.tracking.repeats import Logged, stored
from toolkit.tracking.store import Store

METRICS_AT_ONCE = 1000
"""Most metrics MLflow takes in one batch."""

PARAMS_AT_ONCE = 100
"""Most parameters MLflow takes in one batch; the same for tags."""

REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
)
"""MLflow's codes for a record that will never be taken, however often it is sent."""


class UndeliveredError(Exception):
    """The store did not answer; what is left stays in the outbox."""


class Delivery:
    """The way from one outbox into one store. Every call may wait for the store."""

    def __init__(self, outbox: Outbox, store: Store) -> None:
        self._outbox = outbox
        self._store = store
        self._client: Any = None
        self._done = outbox.delivered
        self._goes_on = self._done.run_id is not None
        """Whether the run has, or may have, points of another process."""
        self._logged: Logged | None = None
        self._send: dict[str, Callable[[dict[str, Any]], None]] = {
            "create": self._create,
            "params": self._params,
            "tags": self._tags,
            "inputs": self._inputs,
            "file": self._file,
            "model": self._model,
            "finish": self._finish,
            "again": self._again,
            "leave": self._leave,
        }

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once it exists."""
        return self._done.run_id

    def drain(self) -> bool:
        """Deliver all that is in the outbox; return whether the run's end was among it.

        Raises:
            UndeliveredError: The store did not answer.
        """
        from mlflow.exceptions import MlflowException

        finished = False
        for batch in _batches(self._outbox.records(self._done.offset)):
            try:
                self._deliver(batch)
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    raise UndeliveredError(str(error)) from error
                self._pass_over(batch, str(error))
            except OSError as error:  # artifacts travel by requests and by the file system
                raise UndeliveredError(str(error)) from error
            finished = batch[-1].op in LAST_WORDS or (finished and batch[-1].op not in FIRST_WORDS)
        return finished

    def _deliver(self, batch: list[Record]) -> None:
        if self._client is None:
            self._client = mlflow_client.connect(self._store)
        doubtful = self._done.in_doubt
        self._done = self._outbox.note(self._done, in_doubt=True)
        if batch[0].op == "metrics":
            self._metrics(batch, doubtful)
        else:
            self._send[batch[0].op](batch[0].values | {"doubtful": doubtful})
        self._done = self._outbox.note(self._done, offset=batch[-1].end, in_doubt=False)

    def _pass_over(self, batch: list[Record], reason: str) -> None:
        refused = (*self._done.refused, f"{batch[0].op}: {reason}")
        self._done = self._outbox.note(
            self._done, offset=batch[-1].end, in_doubt=False, refused=refused
        )

    def _create(self, values: dict[str, Any]) -> None:
        experiment = mlflow_client.experiment_id(self._client, self._store, values["experiment"])
        found = (
            self._find_run(experiment, values["tags"]["toolkit.key"])
            if values["doubtful"] or values.get("again")
            else None
        )
        self._goes_on = found is not None
        if found is None:
            found = self._client.create_run(
                experiment,
                start_time=values["start_ms"],
                tags=values["tags"],
                run_name=values["name"],
            )
        self._done = self._outbox.note(self._done, run_id=found.info.run_id)
        if values.get("again"):
            self._runs_again()

    def _again(self, _values: dict[str, Any]) -> None:
        """Another process goes on with a run."""
        self._goes_on = True
        self._runs_again()

    def _runs_again(self) -> None:
        """It runs, whatever it was, and what went wrong before is past."""
        self._client.update_run(self.run_id, status="RUNNING")
        if "toolkit.error" in self._client.get_run(self.run_id).data.tags:
            self._client.delete_tag(self.run_id, "toolkit.error")

    def _leave(self, values: dict[str, Any]) -> None:
        """A process leaves a run to another one; ``SCHEDULED`` where that is not sure to come soon."""
        if values["status"]:
            self._client.update_run(self.run_id, status=values["status"])

    def _find_run(self, experiment: str, key: str) -> Any:
        found = self._client.search_runs(
            [experiment], f"tags.`toolkit.key` = '{key}'", max_results=1
        )
        return found[0] if found else None

    def _params(self, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(k, v) for k, v in values["params"].items()]
        for some in _chunks(params, PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=some)

    def _tags(self, values: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(k, v) for k, v in values["tags"].items()]
        for some in _chunks(tags, PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, tags=some)

    def _inputs(self, values: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        given = [
            DatasetInput(
                Dataset(d["name"], d["digest"][:36], "local", d["source"], profile=d["profile"]),
                [InputTag("mlflow.data.context", d["context"])],
            )
            for d in values["datasets"]
        ]
        self._client.log_inputs(self.run_id, given)

    def _metrics(self, batch: list[Record], doubtful: bool) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(
                key,
                value,
                record.values["ms"],
                record.values["step"],
                model_id=self._model_of(record),
            )
            for record in batch
            for key, value in record.values["metrics"].items()
        ]
        if doubtful:
            metrics, self._logged = self._missing(metrics), None
        if self._goes_on:
            self._logged = self._logged or Logged(self._client, str(self.run_id))
            metrics = self._logged.new(metrics)
        for some in _chunks(metrics, METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=some)

    def _model_of(self, record: Record) -> str | None:
        return self._done.model_id if record.values.get("of_model") else None

    def _missing(self, metrics: list[Any]) -> list[Any]:
        """Those of ``metrics`` that the run does not have yet."""
        keys = {metric.key for metric in metrics}
        have = {
            _identity(m) for key in keys for m in self._client.get_metric_history(self.run_id, key)
        }
        return [metric for metric in metrics if _identity(metric) not in have]

    def _file(self, values: dict[str, Any]) -> None:
        if Path(
            values["path"]
        ).exists():  # an artifact may be removed before a lost server comes back
            self._client.log_artifact(self.run_id, values["path"], values["folder"] or None)

    def _model(self, values: dict[str, Any]) -> None:
        """Register a folder of weights as MLflow's LoggedModel: a link with lineage, no copy."""
        from mlflow.entities import LoggedModelOutput

        run = self._client.get_run(self.run_id)
        key = run.data.tags["toolkit.key"]
        experiment = run.info.experiment_id
        known = (
            self._client.search_logged_models([experiment], f"tags.`toolkit.key` = '{key}'")
            if values["doubtful"]
            else []
        )
        model = (
            known[0]
            if known
            else self._client.create_logged_model(
                experiment,
                name=values["name"],
                source_run_id=self.run_id,
                tags=values["tags"] | {"toolkit.key": key},
                model_type=values["model_type"],
            )
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, 0)])
        self._done = self._outbox.note(self._done, model_id=model.model_id)

    def _finish(self, values: dict[str, Any]) -> None:
        self._client.set_terminated(self.run_id, values["status"], values["ms"])


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Consecutive metric records together, up to MLflow's limit; every other record alone."""
    batch: list[Record] = []
    for record in records:
        size = sum(len(r.values["metrics"]) for r in (*batch, record) if r.op == "metrics")
        if batch and (record.op != "metrics" or size > METRICS_AT_ONCE):
            yield batch
            batch = []
        batch.append(record)
        if record.op != "metrics":
            yield batch
            batch = []
    if batch:
        yield batch


def _identity(metric: Any) -> tuple[str, int, int, str]:
    """What makes a point the same point, with the value as MLflow stores it."""
    return metric.key, metric.step, metric.timestamp, stored(metric.value)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
